"""What a whole cache must do: what was stored comes back bit for bit, or it is a miss.

    class TestMyCache(CacheTests):
        def open_cache(self, config, spec, tiers=None):
            return CacheEngine(config, spec, tiers=tiers)

The oracle is raw tensors by plain indexing (`kvlab.Pool`), raw files, and a fresh cache. Random histories are in
`cachemachine`.
"""

from __future__ import annotations

from lmcache_conformance.suites.cache_bytes import CacheBytesTests
from lmcache_conformance.suites.cache_faults import CacheFaultTests
from lmcache_conformance.suites.cache_names import CacheNameTests
from lmcache_conformance.suites.cache_pressure import CachePressureTests

__all__ = ["CacheTests"]


class CacheTests(CachePressureTests, CacheFaultTests, CacheNameTests, CacheBytesTests):
    """The whole contract of caches."""
