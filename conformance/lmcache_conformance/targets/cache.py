"""The whole cache engine, from tensors to tensors, and random histories of it."""

from lmcache_conformance.suites.cache import CacheTests
from lmcache_conformance.suites.cache_machine import CacheMachineTests


class TestCache(CacheTests):
    """See `CacheTests`."""


class TestHistories(CacheMachineTests):
    """See `CacheMachineTests`."""
