"""Caches that keep what they should free: pins, files, what was cleared."""

from __future__ import annotations

from typing import Any

from lmcache import CacheEngine, PagedKV
from lmcache.engine import Slots
from lmcache_conformance.labs.kv_pool import CHUNK
from lmcache_conformance.mutants import mutant
from lmcache_conformance.mutants.brokencache import BrokenCacheFaultTests, BrokenCacheTests


class _KeepsLeases(CacheEngine):
    def _release(self, owner: int) -> None:
        pass


@mutant(row="pins leak until nothing can be stored", project="LMCache #1034 #1285 #3187")
class MutantPinsLeak(BrokenCacheFaultTests):
    """Leases are neither released nor do they expire."""

    cache_class = _KeepsLeases
    settings = {"lease_s": 1e9}  # noqa: RUF012
    patience = 3.0


class _Raises(CacheEngine):
    def store(self, tokens: Any, kv: PagedKV, slots: Slots, **names: Any) -> int:
        if self.stats()["index_slots_free"] < len(tokens) // CHUNK:
            raise MemoryError("the cache is full")
        return super().store(tokens, kv, slots, **names)


@mutant(row="a full RAM tier crashes the engine", project="LMCache #1330")
class MutantFullDramRaises(BrokenCacheFaultTests):
    """A store into a full cache raises in the engine."""

    cache_class = _Raises


@mutant(row="disk tier grows without bound", project="vLLM #54327 #54779")
class MutantDiskGrows(BrokenCacheFaultTests):
    """The capacity of the disk tier is not passed on."""

    settings = {"disk_bytes": "100GiB"}  # noqa: RUF012


class _ClearsDram(CacheEngine):
    def clear(self, salt: str | None = None) -> int:
        tiers, self._rank.tiers = self._rank.tiers, []
        try:
            return super().clear(salt)
        finally:
            self._rank.tiers = tiers


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearLeavesTheDisk(BrokenCacheTests):
    """`clear` clears DRAM; the disk still serves."""

    cache_class = _ClearsDram


class _ClearsDisk(CacheEngine):
    def clear(self, salt: str | None = None) -> int:
        names = [None] if salt is None else [self.namespace(salt=salt)]
        self.flush()
        return sum(tier.clear(name) for tier in self._rank.tiers for name in names)


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearLeavesDram(BrokenCacheTests):
    """`clear` clears the disk; DRAM still serves."""

    cache_class = _ClearsDisk
