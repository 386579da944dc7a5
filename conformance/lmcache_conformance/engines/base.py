"""Fixtures and parameters of the engine suite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

import pytest

from lmcache_conformance.contract import Capabilities
from lmcache_conformance.engines.bench import Bench, Case, cases_for
from lmcache_conformance.labs.models import REAL
from lmcache_conformance.labs.scratch import scratch_folder
from lmcache_conformance.runner.discover import NotInstalledError, find_adapter


def chunk_tokens_of(adapter: str) -> int:
    """Returns the chunk size that suits an adapter's block size."""
    return int(getattr(find_adapter(adapter), "chunk_tokens", 16))


class EngineBase:
    """Attributes that a subclass may set, and the fixtures."""

    adapter: ClassVar[str | None] = None
    """Entry point name or `module:attribute`; None: the one given by `--lmcache-adapter`."""

    capabilities: ClassVar[Capabilities | None] = None
    """Overrides the adapter's own capabilities."""

    budget: ClassVar[str | None] = None
    """`quick` or `full`; None: as given by `--lmcache-budget`."""

    chunk_tokens: ClassVar[int | None] = None
    """Chunk size, a multiple of the engine's block size. None: the adapter's `chunk_tokens`, or 16."""

    timeout_s: ClassVar[float] = 120.0
    """Time limit in seconds for one call of the engine, after which it counts as hung. Five times as long for real models."""

    may_write: ClassVar[tuple[str, ...]] = ("lmcache/fingerprints.json",)
    """Patterns of files (below HOME, TMPDIR or the working directory) that the engine may write; by default the fingerprints
    of model files that `lmcache.keys.model_identity` caches. The adapter's own `may_write` is added."""

    @classmethod
    def _chosen(cls, config: pytest.Config) -> tuple[str, Capabilities] | None:
        reference = cls.adapter or config.option.lmcache_adapter
        if not reference:
            return None
        try:
            return reference, cls.capabilities or find_adapter(reference).capabilities
        except NotInstalledError:
            return None  # the tests are skipped with that reason

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each test once per model and dtype."""
        if "case" not in metafunc.fixturenames:
            return
        chosen = self._chosen(metafunc.config)
        if chosen is None:  # the tests are skipped, because there is no adapter
            metafunc.parametrize("case", [Case("llama", "float32")], ids=str, scope="class")
            return
        budget = self.budget or metafunc.config.option.lmcache_budget or "quick"
        cases = cases_for(metafunc.function, chosen[1], budget)
        metafunc.parametrize("case", cases, ids=str, scope="class")

    @pytest.fixture
    def full(self, lmcache_budget: str) -> bool:
        """Whether the budget is `full`."""
        return (self.budget or lmcache_budget) == "full"

    @pytest.fixture(scope="class")
    @classmethod
    def benches(cls, request: pytest.FixtureRequest, case: Case) -> Iterator[Bench]:
        """The test bench that the tests of one class and case share."""
        chosen = cls._chosen(request.config)
        if chosen is None:
            pytest.skip("no adapter was chosen: --lmcache-adapter NAME")
        timeout_s = cls.timeout_s * (5 if case.model in REAL else 1)
        chunk = chunk_tokens_of(chosen[0]) if cls.chunk_tokens is None else cls.chunk_tokens
        with scratch_folder("lmcache-engines-") as folder:
            bench = Bench(chosen[0], chosen[1], case, folder, chunk_tokens=chunk, timeout_s=timeout_s)
            try:
                yield bench
            finally:
                bench.close()

    @pytest.fixture
    def bench(self, benches: Bench, lmcache_seed: int, request: pytest.FixtureRequest) -> Bench:
        """The shared test bench, with random numbers seeded for this test."""
        benches.rng = random.Random(f"{lmcache_seed} {request.node.name}")
        return benches
