"""Our own names keep the contract of names: the target is run here as it is.

Their exact values are frozen in tests/core/test_keys.py.
"""

from lmcache_conformance.targets.keys import TestKeys

__all__ = ["TestKeys"]
