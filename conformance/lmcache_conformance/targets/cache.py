"""The cache itself, from tensors to tensors, and random histories of it."""

from lmcache_conformance.cache import CacheTests
from lmcache_conformance.cachemachine import CacheMachineTests


class TestCache(CacheTests):
    """See `CacheTests`."""


class TestHistories(CacheMachineTests):
    """See `CacheMachineTests`."""
