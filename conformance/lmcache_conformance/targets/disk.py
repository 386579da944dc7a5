"""The disk tier."""

from lmcache_conformance.labs.our_tiers import DiskTierTests


class TestDisk(DiskTierTests):
    """See `TierTests`."""
