"""The tier in this process's memory."""

from lmcache_conformance.labs.our_tiers import MemoryTierTests


class TestMemory(MemoryTierTests):
    """See `TierTests`."""
