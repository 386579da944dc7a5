"""The tier in this process's memory."""

from lmcache_conformance.ours import MemoryTierTests


class TestMemory(MemoryTierTests):
    """See `TierTests`."""
