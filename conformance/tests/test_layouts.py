"""Every known layout passes the layout suite: runs the target of the conformance command unchanged."""

from lmcache_conformance.targets.layouts import TestAmbiguousShape, TestDtypes, TestEngines

__all__ = ["TestAmbiguousShape", "TestDtypes", "TestEngines"]
