"""The memory tier keeps the contract of tiers."""

from __future__ import annotations

from pathlib import Path

from tier_suite import TierTests
from tierlab import get, object_id, put

from lmcache.plan import Status
from lmcache.tiers.base import Tier
from lmcache.tiers.memory import MemoryTier


class TestMemoryTier(TierTests):
    persistent = False

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        return MemoryTier(capacity)


def test_what_was_read_last_is_evicted_last() -> None:
    tier = MemoryTier(300)
    for number in range(3):
        put(tier, object_id(number), bytes(100))
    get(tier, object_id(0), 100)
    put(tier, object_id(3), bytes(100))
    held = [result.status is Status.OK for result in tier.contains([object_id(number) for number in range(4)])]
    assert held == [True, False, True, True]
