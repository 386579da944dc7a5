"""Makes Hypothesis' draws depend only on a known seed, so that the reproduction command repeats a failure exactly."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_SEED = pytest.StashKey[int]()


def seed_of(item: pytest.Item) -> int | None:
    """Returns the seed of a test of the suite; None for any other test."""
    return item.stash.get(_SEED, None)


@contextmanager
def known_seed(item: pytest.Item) -> Iterator[None]:
    """Seeds a test with the number given by `--hypothesis-seed`, or with a random one, which is shown in the report."""
    given = str(getattr(item.config.option, "hypothesis_seed", None))
    # Hypothesis accepts any text as a seed, but tests that draw without Hypothesis need a number.
    item.stash[_SEED] = int(given) if given.isdigit() else random.SystemRandom().randrange(2**32)
    with _seeded(item.stash[_SEED]), _without_local_constants():
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Has the effect of `--hypothesis-seed` for one test."""
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
    """Disables Hypothesis' drawing of constants from the source of imported modules, which is not reproducible."""
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
