"""The cache engine keeps the contract of caches."""

from __future__ import annotations

from lmcache_conformance.cachefaults import CacheTests


class TestCache(CacheTests):
    pass
