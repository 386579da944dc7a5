"""`LMCacheStorage`: what HiCache calls to keep host pages, find them again and fetch them.

SGLang names pages by hashes that cover the tokens before them and the request's `extra_key` and `cache_salt`, but neither
model, dtype, page size nor rank: these are the namespace's. A key names its page by itself, wherever in a request a call begins.

SGLang calls from threads of its own (one that looks up and fetches, one that backs up), never from its scheduler. Nothing here
raises into it: what goes wrong is a miss, a counter and one log line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
    PoolTransferResult,
)

from lmcache.adapter import join_log
from lmcache.config import Config
from lmcache.engine import CacheEngine
from lmcache.errors import ConfigError
from lmcache.keyed import KeyedCache
from lmcache.observe.log import info
from lmcache.spec import Numerics
from lmcache_sglang import compat
from lmcache_sglang.guard import Guarded
from lmcache_sglang.launch import BACKEND, OWN
from lmcache_sglang.pools import Pages, Rank, pages_of

KV = "kv"
_STATE = "mamba"
"""The one pool whose ranks hold different things even where their KV is the same."""

_BATCH = 128
"""Pages moved in one call of the core, as SGLang does it itself."""


class Store:
    """One host pool's pages, with tiers of their own beneath.

    Args:
        pages: how to reach them.
        config: settings; `chunk_tokens` is replaced by the tokens of a page.
    """

    objects_of = KeyedCache
    """What deliberately broken backends replace."""

    def __init__(self, pages: Pages, config: Config, scope: str) -> None:
        self.pages = pages
        self.engine = CacheEngine(replace(config, chunk_tokens=pages.object_tokens), pages.spec)
        self._objects = self.objects_of(self.engine, scope=scope)

    def has(self, key: str) -> bool:
        """This page alone is there."""
        return self._objects.exists([key]) == 1

    def leading(self, keys: Sequence[str]) -> int:
        """How many leading pages are there."""
        return self._objects.exists(keys)

    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        """Take pages in; True for each that is kept, or was already."""
        done: list[bool] = []
        for part, where in self._parts(keys, slots):
            kv, rows = self.pages.prepared(where, reading=True)
            taken = self._objects.store(part, kv, rows)
            kept = len(part) if taken == len(part) else self._objects.exists(part)
            done += [i < kept for i in range(len(part))]
        return done

    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        """Fill pages; True for each leading one that arrived. The slots of the others are undefined."""
        done: list[bool] = []
        for part, where in self._parts(keys, slots):
            kv, rows = self.pages.prepared(where, reading=False)
            loaded = self._objects.load(part, kv, rows)
            self.pages.landed(kv, where, loaded)
            done += [i < loaded for i in range(len(part))]
            if loaded < len(part):
                break
        return done + [False] * (len(keys) - len(done))

    def set_flat(self, key: str, page: torch.Tensor) -> bool:
        """Take in one page that lies flat somewhere else."""
        kv, slots = self.pages.flat(page)
        return self._objects.store([key], kv, slots) == 1 or self.has(key)

    def get_flat(self, key: str, page: torch.Tensor) -> bool:
        """Fill one page that lies flat somewhere else."""
        kv, slots = self.pages.flat(page)
        return self._objects.load([key], kv, slots) == 1

    def _parts(self, keys: Sequence[str], slots: torch.Tensor) -> list[tuple[Sequence[str], torch.Tensor]]:
        slots = slots.to("cpu", torch.int64).flatten()
        page = self.pages.page_tokens
        if len(slots) != len(keys) * page:
            raise ValueError(f"{len(slots)} host indices for {len(keys)} pages of {page} tokens")
        return [(keys[i : i + _BATCH], slots[i * page : (i + _BATCH) * page]) for i in range(0, len(keys), _BATCH)]


class LMCacheStorage(Guarded, HiCacheStorage):
    """HiCache's storage, by `--hicache-storage-backend dynamic`.

    Args:
        storage_config: SGLang's; `extra_config` holds our settings beside the keys that loaded this class.
        kwargs: SGLang's, unused.
    """

    store_of = Store
    """What deliberately broken backends replace."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        Guarded.__init__(self, Config(dram_bytes=0))
        self._stores: dict[str, Store] = {}
        self._refused: dict[str, str] = {}
        self._shared = storage_config
        self._rank = Rank(
            storage_config.tp_rank, storage_config.tp_size, storage_config.pp_rank, storage_config.pp_size
        )
        self._model, self._numerics = "", Numerics()
        join_log()
        try:
            self._config = settings_of(storage_config.extra_config)
            if warning := compat.check_version():
                self._log.warning("untested-version", reason=warning)
            compat.check_config(storage_config)
            self._model = compat.identity_of(self._config)
            self._numerics = compat.numerics_of(int(storage_config.tp_size), int(storage_config.pp_size))
        except Exception as error:
            self._switch_off(error)

    # ---------------------------------------------------------------- start and end

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """SGLang's host pool for KV. Its layout is proven before anything is moved."""
        super().register_mem_pool_host(mem_pool_host)
        if self._off or KV in self._stores:
            return
        try:
            check_chunk(self._config, int(mem_pool_host.page_size))
            self._open(KV, mem_pool_host)
            compat.watch_weights(self._weights_changed)
            store = self._stores[KV]
            spec = store.pages.spec
            info(
                "cache-ready",
                layout=store.pages.label,
                page_tokens=store.pages.page_tokens,
                page_bytes=spec.object_bytes(0, store.pages.object_tokens),
                rank=f"{self._rank.tp_rank}/{self._rank.tp_size}",
                **self._said(),
            )
        except Exception as error:
            self._switch_off(error)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A sidecar pool. One that cannot be read page by page is refused: its pages are misses, and so are hits that need it."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = _name(host_pool_name)
        if self._off or name == KV or name in self._stores:
            return
        try:
            self._open(name, host_pool)
            info("pool-ready", pool=name, layout=self._stores[name].pages.label)
        except Exception as error:
            self._refused[name] = str(error)
            self._log.warning("pool-refused", key=name, pool=name, reason=error)

    def _open(self, name: str, pool: Any) -> None:
        rank = self._rank
        if self._shared.is_mla_model and name != _STATE:  # all ranks hold the same, and one of them writes
            rank = Rank(0, 1, rank.pp_rank, rank.pp_size)
        pages = pages_of(pool, name, self._model, self._numerics, rank)
        self._stores[name] = self.store_of(pages, self._config, f"sglang {name}")

    def get_stats(self) -> None:
        """Nothing in SGLang's own terms; see `stats`."""

    def _engines(self) -> list[CacheEngine]:
        return [store.engine for store in self._stores.values()]

    # ---------------------------------------------------------------- KV pages, without a copy

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages are there."""
        store = self._stores.get(KV)
        return 0 if store is None or not keys else self._safely("exists", 0, lambda: store.leading(keys))

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill host pages; False for each that is not there, not whole, or comes after one of these."""
        return self._get(KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Take host pages in; SGLang may overwrite them on return. Switched off, all are 'done': there is nothing to repeat."""
        return self._set(KV, keys, host_indices)

    def _get(self, name: str, keys: list[str], host_indices: torch.Tensor | None) -> list[bool]:
        store, missing = self._stores.get(name), [False] * len(keys)
        if store is None or host_indices is None or not keys:
            return missing
        return self._safely("load", missing, lambda: store.get(keys, host_indices))

    def _set(self, name: str, keys: list[str], host_indices: torch.Tensor | None) -> list[bool]:
        store = self._stores.get(name)
        if store is None:
            return [bool(self._off)] * len(keys)
        if host_indices is None or not keys:
            return [False] * len(keys)
        if name == KV and not self._shared.is_storage_writer:
            return [True] * len(keys)  # another rank writes the same
        return self._safely("store", [False] * len(keys), lambda: store.set(keys, host_indices))

    # ---------------------------------------------------------------- several pools

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix that every pool can restore, by each pool's own rule; and all prefixes that are possible."""
        return self._safely(
            "exists", PoolTransferResult.empty(), lambda: self._exists_v2(keys, list(pool_transfers or ()))
        )

    def _exists_v2(self, keys: list[str], transfers: list[PoolTransfer]) -> PoolTransferResult:
        held = self.batch_exists(keys)
        hits: dict[str, int] = {KV: held} if held else {}
        possible = range(1, held + 1)
        left = set(possible)
        for transfer in transfers:
            store = self._stores.get(_name(transfer.name))
            if not left:
                break
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # its own verdict, which never decides; without one SGLang computes these
            if store is None:
                mine: set[int] = set()
            elif transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                mine = set(range(1, store.leading(keys[:held]) + 1))
            elif transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                mine = self._trailing(store, keys[:held], max(1, len(transfer.keys or ())))
            else:
                mine = set()
            if mine:
                hits[transfer.name] = max(mine)
            left &= mine
        return PoolTransferResult(max(left, default=0), hits, sorted(left))

    def _trailing(self, store: Store, keys: Sequence[str], count: int) -> set[int]:
        """Prefixes whose last `count` pages are there."""
        there = [store.has(key) for key in keys]
        return {end for end in range(1, len(keys) + 1) if all(there[max(0, end - count) : end])}

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Fill pages of several pools."""
        return {t.name: self._get(_name(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Take in pages of several pools."""
        return {t.name: self._set(_name(t.name), t.keys or [], t.host_indices) for t in transfers}

    # ---------------------------------------------------------------- the generic calls: flat pages

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """A page in `target_location`, flat as the pool's `get_data_page` has it; None if it is not there."""
        store = self._stores.get(KV)
        if store is None or not isinstance(target_location, torch.Tensor):
            return None
        found = self._safely("load", False, lambda: store.get_flat(key, target_location))
        return target_location if found else None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Flat pages."""
        targets = [None] * len(keys) if target_locations is None else target_locations
        return [self.get(key, target) for key, target in zip(keys, targets, strict=False)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep a flat page."""
        store = self._stores.get(KV)
        if store is None or not isinstance(value, torch.Tensor):
            return bool(self._off)
        return self._safely("store", False, lambda: store.set_flat(key, value))

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Flat pages; True if all were kept."""
        return all(self.set(key, value) for key, value in zip(keys, values or [], strict=False))

    def exists(self, key: str) -> bool:
        """The page is there."""
        return self.batch_exists([key]) == 1


def settings_of(extra: Mapping[str, Any] | None) -> Config:
    """Our settings among what SGLang was given, and from the other sources that `Config.load` knows.

    Host memory is SGLang's own pool, so `dram_bytes` is 0 unless somebody says otherwise; memory of ours is never copied to
    a device, so it is not pinned.

    Raises:
        ConfigError: an unknown or impossible setting, or nowhere to keep anything.
    """
    given = {name: value for name, value in (extra or {}).items() if name not in BACKEND and name not in OWN}
    config = Config.load(json=given)
    ours = {"dram_bytes": 0, "pin_memory": "never"}
    config = Config.load({n: v for n, v in ours.items() if config.source(n) == "default"}, json=given)
    if config.disk_path is None and not config.dram_bytes:
        raise ConfigError("disk_path: not set, and dram_bytes is 0, so there is nowhere to keep pages; set disk_path")
    return config


def check_chunk(config: Config, page_tokens: int) -> None:
    """KeyedCache are SGLang's pages; a chunk that was asked for must at least be made of them.

    Raises:
        ConfigError: it is not.
    """
    if config.source("chunk_tokens") != "default" and config.chunk_tokens % page_tokens:
        raise ConfigError(
            f"chunk_tokens: {config.chunk_tokens} is no multiple of SGLang's page of {page_tokens} tokens; leave it out, "
            "objects are SGLang's pages"
        )


def _name(pool: Any) -> str:
    return str(getattr(pool, "value", pool))
