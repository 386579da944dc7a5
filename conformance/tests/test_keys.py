"""The keys of `lmcache.keys` pass the key suite: runs the target of the conformance command unchanged.

Their exact values are fixed in tests/core/test_keys.py.
"""

from lmcache_conformance.targets.keys import TestKeys

__all__ = ["TestKeys"]
