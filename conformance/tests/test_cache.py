"""The cache engine keeps the contract of caches: the target is run here as it is."""

from lmcache_conformance.targets.cache import TestCache

__all__ = ["TestCache"]
