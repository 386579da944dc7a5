"""Our own tiers keep the contract of tiers."""

from __future__ import annotations

from lmcache_conformance.ours import DiskTierTests, MemoryTierTests


class TestMemoryTier(MemoryTierTests):
    pass


class TestDiskTier(DiskTierTests):
    pass
