"""The tier in this process's memory."""

from lmcache_conformance.labs.ours import MemoryTierTests


class TestMemory(MemoryTierTests):
    """See `TierTests`."""
