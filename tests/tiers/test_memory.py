"""What is specific to the memory tier. The contract of the tier interface is tested in conformance/tests."""

from __future__ import annotations

from lmcache.plan import Status
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.labs.tier_objects import get, object_id, put


def test_what_was_read_last_is_evicted_last() -> None:
    tier = MemoryTier(300)
    for number in range(3):
        put(tier, object_id(number), bytes(100))
    get(tier, object_id(0), 100)
    put(tier, object_id(3), bytes(100))
    held = [result.status is Status.OK for result in tier.contains([object_id(number) for number in range(4)])]
    assert held == [True, False, True, True]
