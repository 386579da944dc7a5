"""The suites of caches, run on a cache that a subclass breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmcache import CacheEngine, Config
from lmcache.format.codec import ObjectCodec
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier
from lmcache_conformance.suites.cache_bytes import CacheBytesTests
from lmcache_conformance.suites.cache_factory import CacheFactory
from lmcache_conformance.suites.cache_faults import CacheFaultTests
from lmcache_conformance.suites.cache_names import CacheNameTests
from lmcache_conformance.suites.cache_pressure import CachePressureTests

__all__ = ["BrokenCache", "BrokenCacheFaultTests", "BrokenCacheTests"]


class BrokenCache(CacheFactory):
    """Opens a broken cache."""

    cache_class: type[CacheEngine] = CacheEngine
    io_class: type[ObjectCodec] | None = None
    settings: Mapping[str, Any] = {}
    """Override the settings of each test."""

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """Opens the broken cache."""
        if self.settings:
            given = {s.name: getattr(config, s.name) for s in Config.settings() if config.source(s.name) != "default"}
            changes = {k: v for k, v in self.settings.items() if k != "disk_bytes" or "disk_path" in given}
            config = Config(**(given | changes))
        cache = self.cache_class(config, spec, tiers=tiers)
        if self.io_class is not None:
            cache._rank.transfer.tier_copier._codec = self.io_class(spec, config.chunk_tokens, order=config.disk_order)
        return cache


class BrokenCacheTests(BrokenCache, CacheNameTests, CacheBytesTests):
    """For caches that are always wrong."""

    # Redefined here, it runs last: it starts a process, and most mutants are killed before.
    test_another_process_finds_and_reads_what_was_flushed = (
        CacheBytesTests.test_another_process_finds_and_reads_what_was_flushed
    )


class BrokenCacheFaultTests(BrokenCache, CachePressureTests, CacheFaultTests):
    """For caches that are wrong under faults and memory pressure."""
