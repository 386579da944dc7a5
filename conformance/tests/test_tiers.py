"""The bundled tiers pass the tier suite: runs the targets of the conformance command unchanged."""

from lmcache_conformance.targets.disk import TestDisk
from lmcache_conformance.targets.memory import TestMemory

__all__ = ["TestDisk", "TestMemory"]
