"""The contract of tiers as tests. Subclass `TierTests`, implement `open_tier`, and run pytest:

    class TestMyTier(TierTests):
        capabilities = TierCapabilities(persistent=True, bounded=True)

        def open_tier(self, place, capacity):
            return MyTier(place, capacity)

The suite makes no assumptions about how a tier works. Tests of capabilities that a tier does not claim are skipped with that
reason. If you implement raw access that bypasses the tier (`raw_get`, `raw_put`, `raw_files`), the suite uses it as its oracle.
"""

from __future__ import annotations

from lmcache_conformance.suites.tier_bytes import TierBytesTests
from lmcache_conformance.suites.tier_durability import TierDurabilityTests
from lmcache_conformance.suites.tier_factory import TierCapabilities
from lmcache_conformance.suites.tier_faults import TierFaultTests

__all__ = ["TierCapabilities", "TierTests"]


class TierTests(TierDurabilityTests, TierFaultTests, TierBytesTests):
    """The contract of `lmcache.tiers.base.Tier`."""
