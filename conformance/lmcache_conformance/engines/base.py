"""Fixtures and parameters of the engine suite."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_conformance.contract import Capabilities
from lmcache_conformance.engines.bench import Bench, Case, cases_for
from lmcache_conformance.labs.models import REAL
from lmcache_conformance.runner.discover import NotInstalledError, find_adapter


def chunk_tokens_of(adapter: str) -> int:
    """The chunk that suits an adapter's blocks."""
    return int(getattr(find_adapter(adapter), "chunk_tokens", 16))


class EngineBase:
    """What a subclass may set."""

    adapter: ClassVar[str | None] = None
    """Entry point name or `module:attribute`; None: the one that `--lmcache-adapter` names."""

    capabilities: ClassVar[Capabilities | None] = None
    """Claims, where they are to differ from the adapter's own."""

    budget: ClassVar[str | None] = None
    """`quick` or `full`; None: what `--lmcache-budget` says."""

    chunk_tokens: ClassVar[int | None] = None
    """Must suit the engine: a multiple of its block. None: what the adapter says, or 16."""

    timeout_s: ClassVar[float] = 120.0
    """For one call of the engine; beyond it, it hangs. Real models get five times as long."""

    may_write: ClassVar[tuple[str, ...]] = ("lmcache/fingerprints.json",)
    """Patterns of files (below HOME, TMPDIR or the working directory) that the engine itself leaves behind; by default what
    `lmcache.keys.model_identity` remembers of model files. The adapter's own `may_write` adds to it."""

    @classmethod
    def _chosen(cls, config: pytest.Config) -> tuple[str, Capabilities] | None:
        reference = cls.adapter or config.option.lmcache_adapter
        if not reference:
            return None
        try:
            return reference, cls.capabilities or find_adapter(reference).capabilities
        except NotInstalledError:
            return None  # its tests are skipped with that as the reason

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per model and dtype."""
        if "case" not in metafunc.fixturenames:
            return
        chosen = self._chosen(metafunc.config)
        if chosen is None:  # skipped for want of an adapter
            metafunc.parametrize("case", [Case("llama", "float32")], ids=str, scope="class")
            return
        budget = self.budget or metafunc.config.option.lmcache_budget or "quick"
        cases = cases_for(metafunc.function, chosen[1], budget)
        metafunc.parametrize("case", cases, ids=str, scope="class")

    @pytest.fixture
    def full(self, lmcache_budget: str) -> bool:
        """There is time to be thorough."""
        return (self.budget or lmcache_budget) == "full"

    @pytest.fixture(scope="class")
    @classmethod
    def benches(cls, request: pytest.FixtureRequest, case: Case) -> Iterator[Bench]:
        """What the tests of one class and case share."""
        chosen = cls._chosen(request.config)
        if chosen is None:
            pytest.skip("no adapter was chosen: --lmcache-adapter NAME")
        memory = Path("/dev/shm")
        base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix="lmcache-engines-", dir=base))
        timeout_s = cls.timeout_s * (5 if case.model in REAL else 1)
        chunk = chunk_tokens_of(chosen[0]) if cls.chunk_tokens is None else cls.chunk_tokens
        bench = Bench(chosen[0], chosen[1], case, folder, chunk_tokens=chunk, timeout_s=timeout_s)
        try:
            yield bench
        finally:
            bench.close()
            shutil.rmtree(folder, ignore_errors=True)

    @pytest.fixture
    def bench(self, benches: Bench, lmcache_seed: int, request: pytest.FixtureRequest) -> Bench:
        """The workbench, with random numbers of this test."""
        benches.rng = random.Random(f"{lmcache_seed} {request.node.name}")
        return benches
