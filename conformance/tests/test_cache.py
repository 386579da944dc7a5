"""The cache engine passes the cache suite: runs the target of the conformance command unchanged."""

from lmcache_conformance.targets.cache import TestCache

__all__ = ["TestCache"]
