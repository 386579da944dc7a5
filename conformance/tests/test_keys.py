"""Our own names keep the contract of names (their exact values are frozen in tests/core/test_keys.py): the target is run here as it is."""

from lmcache_conformance.targets.keys import TestKeys

__all__ = ["TestKeys"]
