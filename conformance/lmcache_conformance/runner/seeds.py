"""Makes what Hypothesis draws depend on a known seed alone, so that a failure's command repeats it exactly."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_SEED = pytest.StashKey[int]()


def seed_of(item: pytest.Item) -> int | None:
    """The seed of a test of ours; None of any other."""
    return item.stash.get(_SEED, None)


@contextmanager
def known_seed(item: pytest.Item) -> Iterator[None]:
    """While a test runs: the number given by `--hypothesis-seed`, or a random one that the report will name."""
    given = str(getattr(item.config.option, "hypothesis_seed", None))
    # Hypothesis takes any text as a seed; a seed that is none we cannot hand to tests that draw without it.
    item.stash[_SEED] = int(given) if given.isdigit() else random.SystemRandom().randrange(2**32)
    with _seeded(item.stash[_SEED]), _without_local_constants():
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What `--hypothesis-seed` does, for one test."""
    core: Any = sys.modules.get("hypothesis.core")
    before = getattr(core, "global_force_seed", None)
    if core is None or before is not None:
        yield
        return
    core.global_force_seed = seed
    try:
        yield
    finally:
        core.global_force_seed = before


@contextmanager
def _without_local_constants() -> Iterator[None]:
    """Hypothesis also draws constants that it finds in the source of whatever happens to be imported: not repeatable."""
    providers: Any = sys.modules.get("hypothesis.internal.conjecture.providers")
    names = ("_get_local_constants", "Constants", "CONSTANTS_CACHE")
    if providers is None or not all(hasattr(providers, name) for name in names):
        yield
        return
    before, nothing = providers._get_local_constants, providers.Constants()
    providers._get_local_constants = lambda: nothing
    providers.CONSTANTS_CACHE.cache.clear()
    try:
        yield
    finally:
        providers._get_local_constants = before
        providers.CONSTANTS_CACHE.cache.clear()
