"""`LMCacheStorage`: the storage backend that HiCache calls to store, look up and load host pages.

SGLang's page keys are hashes of all tokens up to the page's end and the request's `extra_key` and `cache_salt`, but not of model,
dtype, page size or rank: those are in the namespace. A key identifies its page alone, so a call may begin anywhere in a request.

SGLang calls from its own threads (one looks up and loads, one backs up), never from its scheduler. Nothing here raises into
SGLang: a failure is a miss, a counter and one log line.
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
"""The one pool whose contents differ between ranks even if their KV is replicated."""

_BATCH = 128
"""Pages per call of the core; SGLang uses the same batch size."""


class Store:
    """Stores and loads the pages of one host pool, with an engine of its own.

    Args:
        pages: access to the pool's pages.
        config: settings; `chunk_tokens` is replaced by the size of a page.
        scope: separates the keys of different pools.
    """

    objects_of = KeyedCache
    """Deliberately broken backends replace this."""

    def __init__(self, pages: Pages, config: Config, scope: str) -> None:
        self.pages = pages
        self.engine = CacheEngine(replace(config, chunk_tokens=pages.object_tokens), pages.spec)
        self._objects = self.objects_of(self.engine, scope=scope)

    def has(self, key: str) -> bool:
        """Returns whether this page is cached."""
        return self._objects.exists([key]) == 1

    def leading(self, keys: Sequence[str]) -> int:
        """Returns how many leading pages are cached."""
        return self._objects.exists(keys)

    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        """Stores pages; returns True for each page that is cached afterwards."""
        done: list[bool] = []
        for part, where in self._parts(keys, slots):
            kv, rows = self.pages.prepared(where, reading=True)
            taken = self._objects.store(part, kv, rows)
            kept = len(part) if taken == len(part) else self._objects.exists(part)
            done += [i < kept for i in range(len(part))]
        return done

    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        """Loads pages; returns True for each leading page that was loaded. The other slots' contents are undefined."""
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
        """Stores one page from a flat buffer outside the pool."""
        kv, slots = self.pages.flat(page)
        return self._objects.store([key], kv, slots) == 1 or self.has(key)

    def get_flat(self, key: str, page: torch.Tensor) -> bool:
        """Loads one page into a flat buffer outside the pool."""
        kv, slots = self.pages.flat(page)
        return self._objects.load([key], kv, slots) == 1

    def _parts(self, keys: Sequence[str], slots: torch.Tensor) -> list[tuple[Sequence[str], torch.Tensor]]:
        slots = slots.to("cpu", torch.int64).flatten()
        page = self.pages.page_tokens
        if len(slots) != len(keys) * page:
            raise ValueError(f"{len(slots)} host indices for {len(keys)} pages of {page} tokens")
        return [(keys[i : i + _BATCH], slots[i * page : (i + _BATCH) * page]) for i in range(0, len(keys), _BATCH)]


class LMCacheStorage(Guarded, HiCacheStorage):
    """Storage backend of HiCache, loaded by `--hicache-storage-backend dynamic`.

    Args:
        storage_config: from SGLang; `extra_config` holds our settings and the keys that made SGLang load this class.
        kwargs: from SGLang; unused.
    """

    store_of = Store
    """Deliberately broken backends replace this."""

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
            if meaning := compat.meaning():
                self._model += f" meaning {meaning}"
            self._numerics = compat.numerics_of(int(storage_config.tp_size), int(storage_config.pp_size))
        except Exception as error:
            self._switch_off(error)

    # ---------------------------------------------------------------- start and end

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Opens SGLang's host pool for KV, after proving its layout."""
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
                **self._changed_settings(),
            )
        except Exception as error:
            self._switch_off(error)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Opens a sidecar pool. A pool without page access is refused: prefixes that need it are misses."""
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
        if self._shared.is_mla_model and name != _STATE:  # replicated on all ranks; one of them writes
            rank = Rank(0, 1, rank.pp_rank, rank.pp_size)
        pages = pages_of(pool, name, self._model, self._numerics, rank)
        self._stores[name] = self.store_of(pages, self._config, f"sglang {name}")

    def get_stats(self) -> None:
        """Returns None: there are no metrics in SGLang's own format; see `stats`."""

    def _engines(self) -> list[CacheEngine]:
        return [store.engine for store in self._stores.values()]

    # ---------------------------------------------------------------- KV pages, without a copy

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """Returns how many leading pages are cached."""
        store = self._stores.get(KV)
        return 0 if store is None or not keys else self._safely("exists", 0, lambda: store.leading(keys))

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Loads host pages; returns False for each page that is missing or damaged, and for all pages after it."""
        return self._get(KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Stores host pages, which SGLang may overwrite on return. All True if caching is disabled: SGLang must not retry."""
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
            return [True] * len(keys)  # another rank writes the same page
        return self._safely("store", [False] * len(keys), lambda: store.set(keys, host_indices))

    # ---------------------------------------------------------------- several pools

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Returns the longest prefix that all pools can restore, by each pool's hit policy, and all restorable prefixes."""
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
                continue  # optional: SGLang computes these without a hit
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
        """Returns the lengths of prefixes whose last `count` pages are cached."""
        cached = [store.has(key) for key in keys]
        return {end for end in range(1, len(keys) + 1) if all(cached[max(0, end - count) : end])}

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Loads pages of several pools."""
        return {t.name: self._get(_name(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Stores pages of several pools."""
        return {t.name: self._set(_name(t.name), t.keys or [], t.host_indices) for t in transfers}

    # ---------------------------------------------------------------- the generic calls: flat pages

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """Loads a page into `target_location`, in the format of the pool's `get_data_page`; returns None on a miss."""
        store = self._stores.get(KV)
        if store is None or not isinstance(target_location, torch.Tensor):
            return None
        found = self._safely("load", False, lambda: store.get_flat(key, target_location))
        return target_location if found else None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Loads flat pages; see `get`."""
        targets = [None] * len(keys) if target_locations is None else target_locations
        return [self.get(key, target) for key, target in zip(keys, targets, strict=False)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Stores a flat page."""
        store = self._stores.get(KV)
        if store is None or not isinstance(value, torch.Tensor):
            return bool(self._off)
        return self._safely("store", False, lambda: store.set_flat(key, value))

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Stores flat pages; returns whether all are cached."""
        return all(self.set(key, value) for key, value in zip(keys, values or [], strict=False))

    def exists(self, key: str) -> bool:
        """Returns whether the page is cached."""
        return self.batch_exists([key]) == 1


def settings_of(extra: Mapping[str, Any] | None) -> Config:
    """Returns the settings in SGLang's extra config and from the other sources of `Config.load`.

    Host memory is SGLang's own pool, so `dram_bytes` defaults to 0; our memory is never copied to a device, so it is not pinned
    by default.

    Raises:
        ConfigError: a setting is unknown or impossible, or there is neither DRAM nor disk to cache in.
    """
    given = {name: value for name, value in (extra or {}).items() if name not in BACKEND and name not in OWN}
    config = Config.load(json=given)
    ours = {"dram_bytes": 0, "pin_memory": "never"}
    config = Config.load({n: v for n, v in ours.items() if config.source(n) == "default"}, json=given)
    if config.disk_path is None and not config.dram_bytes:
        raise ConfigError("disk_path: not set, and dram_bytes is 0, so there is nowhere to keep pages; set disk_path")
    return config


def check_chunk(config: Config, page_tokens: int) -> None:
    """Checks that an explicit `chunk_tokens` is a multiple of SGLang's page, as objects are SGLang's pages.

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
