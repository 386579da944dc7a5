"""Every layout of the design keeps the contract of layouts: the target is run here as it is."""

from lmcache_conformance.targets.layouts import TestAmbiguousShape, TestDtypes, TestEngines

__all__ = ["TestAmbiguousShape", "TestDtypes", "TestEngines"]
