"""What every tier must do, as tests. Subclass `TierTests`, say how to open your tier, and run pytest:

    class TestMyTier(TierTests):
        capabilities = TierCapabilities(persistent=True, bounded=True)

        def open_tier(self, place, capacity):
            return MyTier(place, capacity)

The suite knows nothing of how a tier works; what a tier can't do it does not claim, and the tests that need it are skipped
with that reason. Where you offer a way around the tier (`raw_get`, `raw_put`, `raw_files`), the suite uses it as its oracle.
"""

from __future__ import annotations

from lmcache_conformance.suites.tier_bytes import TierBytesTests
from lmcache_conformance.suites.tier_factory import TierCapabilities
from lmcache_conformance.suites.tier_faults import TierFaultTests

__all__ = ["TierCapabilities", "TierTests"]


class TierTests(TierFaultTests, TierBytesTests):
    """The contract of `lmcache.tiers.base.Tier`."""
