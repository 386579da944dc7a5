"""The in-process memory tier."""

from lmcache_conformance.labs.our_tiers import MemoryTierTests


class TestMemory(MemoryTierTests):
    """See `TierTests`."""
