"""The disk tier."""

from lmcache_conformance.labs.ours import DiskTierTests


class TestDisk(DiskTierTests):
    """See `TierTests`."""
