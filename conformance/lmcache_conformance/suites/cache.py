"""The contract of a whole cache: stored KV comes back bit for bit, or the lookup is a miss.

    class TestMyCache(CacheTests):
        def open_cache(self, config, spec, tiers=None):
            return CacheEngine(config, spec, tiers=tiers)

The oracle is raw tensors read by plain indexing (`kv_pool.Pool`), raw files, and a fresh cache. Random histories are in
`cache_machine`.
"""

from __future__ import annotations

from lmcache_conformance.suites.cache_bytes import CacheBytesTests
from lmcache_conformance.suites.cache_faults import CacheFaultTests
from lmcache_conformance.suites.cache_names import CacheNameTests
from lmcache_conformance.suites.cache_pressure import CachePressureTests
from lmcache_conformance.suites.cache_process import CacheProcessTests

__all__ = ["CacheTests"]


class CacheTests(CacheProcessTests, CachePressureTests, CacheFaultTests, CacheNameTests, CacheBytesTests):
    """The whole contract of caches."""
