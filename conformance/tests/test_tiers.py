"""Our own tiers keep the contract of tiers: the targets are run here as they are."""

from lmcache_conformance.targets.disk import TestDisk
from lmcache_conformance.targets.memory import TestMemory

__all__ = ["TestDisk", "TestMemory"]
