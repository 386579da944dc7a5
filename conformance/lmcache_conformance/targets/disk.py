"""The disk tier."""

from lmcache_conformance.ours import DiskTierTests


class TestDisk(DiskTierTests):
    """See `TierTests`."""
