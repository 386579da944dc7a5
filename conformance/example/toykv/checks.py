"""Everything needed to test the tier. The engine needs only its entry point."""

from lmcache_conformance.suites.tiers import TierCapabilities, TierTests
from toykv.tier import SqliteTier


class TestSqlite(TierTests):
    capabilities = TierCapabilities(persistent=True, durable=True, bounded=True, shared=True)

    def open_tier(self, place, capacity):
        return SqliteTier(place / "objects.sqlite", capacity)
