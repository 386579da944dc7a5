"""Random histories of the index can fail: alone, they notice what is wrong with these mutants."""

from __future__ import annotations

import pytest

from lmcache_conformance.mutants.index import (
    MutantBelievesTheDead,
    MutantFailedLoadIsSuccess,
    MutantFailedStoreIsReady,
    MutantPinsLeak,
    MutantReadersPinNothing,
    MutantSideStateIsOptional,
    MutantVisibleBeforeItIsStored,
)
from lmcache_conformance.suites.index_machine import IndexMachine
from lmcache_conformance.suites.tier_machine import run_machine

NOTICED = [
    MutantBelievesTheDead,
    MutantFailedLoadIsSuccess,
    MutantFailedStoreIsReady,
    MutantPinsLeak,
    MutantReadersPinNothing,
    MutantSideStateIsOptional,
    MutantVisibleBeforeItIsStored,
]


@pytest.mark.parametrize("mutant", NOTICED)
def test_random_histories_alone_notice_a_broken_index(mutant: type) -> None:
    # An index that is broken may also trip over itself before a check of the machine sees it: red all the same.
    with pytest.raises((AssertionError, AttributeError, LookupError, TypeError)):
        # It ends with the first that fails, mostly within a few dozen; 400 were not always enough.
        run_machine(lambda: IndexMachine(mutant().open_index), examples=2500, steps=50, shrink=False)
