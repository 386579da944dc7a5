"""`LMCacheLinker`: copies between SGLang's device pools and the tiers, without SGLang's host pool. Tested with SGLang 0.5.23.

SGLang calls `lookup` for the tail of a prompt (each time it considers a waiting request), `load` when it admits the request,
and `offload` with what requests have computed. Its interface passes page hashes; hooks provide the tokens
(`compat.watch_tokens`), so that keys are the same as in every other engine.

A load completes on every rank before `load` returns, or it is a miss: SGLang aborts requests whose load fails later. To keep
that short, hits on lower tiers are prefetched into DRAM while the request waits. Storing runs on its own thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from lmcache.adapter import join_log
from lmcache.config import Config
from lmcache.engine import CacheEngine, Hit
from lmcache.errors import ConfigError
from lmcache.observe.log import info
from lmcache_sglang import compat
from lmcache_sglang.compat import Text
from lmcache_sglang.devicepool import DevicePool
from lmcache_sglang.guard import Guarded
from lmcache_sglang.pools import Rank


class Landed:
    """SGLang's counter of loaded layers; a no-op, because loads complete before the forward pass begins."""

    consumer_index = -1

    def set_consumer(self, index: int) -> None:
        """See `LayerWiseLoadCounter`."""

    def wait_until(self, threshold: int) -> None:
        """See `LayerWiseLoadCounter`."""


@dataclass
class _Waiting:
    """A waiting request that was looked up: its hit, until when the hit is leased, and whether it is being prefetched."""

    text: Text
    device_tokens: int
    hit: Hit
    until: float
    fetching: bool = False

    def is_about(self, text: Text, device_tokens: int) -> bool:
        """Whether this lookup was for the same text: request ids may be reused, and a preempted request has more tokens."""
        return (
            self.device_tokens == device_tokens
            and self.text[1:] == text[1:]
            and np.array_equal(self.text.tokens, text.tokens)
        )


class LMCacheLinker(Guarded, UnifiedCacheLinker):
    """External cache linker, enabled by `--enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic`.

    Args:
        server_args, forward_stream: SGLang's.
        params: SGLang's `CacheInitParams`.
        components: what SGLang's tree keeps for each node.
        extra_config: settings of `lmcache.Config`.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        Guarded.__init__(self, Config())
        self.forward_stream = forward_stream
        self.layer_done_counter = Landed()
        self.pools: dict[PoolName, object] = {PoolName.KV: self}
        self._page = int(params.page_size)
        self._engine: CacheEngine | None = None
        self._asked: tuple[Text, int] | None = None
        self._offered: tuple[Text, torch.Tensor] | None = None
        self._tree: Any = None
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()  # in order of expiry
        self._storing = ThreadPoolExecutor(1, "lmcache-offload")
        self._offers: deque[Future[bool]] = deque()
        join_log()
        try:
            self._config = linker_settings(extra_config, self._page)
            self._open(params, components)
        except Exception as error:
            self._switch_off(error)

    def _open(self, params: Any, components: Any) -> None:
        if warning := compat.check_version():
            self._log.warning("untested-version", reason=warning)
        compat.check_linking(params, components)
        rank, ranks = compat.rank_of(params)
        numerics = compat.numerics_of(ranks, int(params.pp_size))
        self._pool = DevicePool(
            params.token_to_kv_pool_allocator.get_kvcache(),
            self._page,
            compat.identity_of(self._config),
            numerics,
            Rank(rank, ranks, int(params.pp_rank), int(params.pp_size)),
            compat.meaning(),
        )
        compat.watch_weights(self._weights_changed)
        compat.watch_tokens()
        self._engine = CacheEngine(self._config, self._pool.spec)
        settings = {**self._changed_settings(), "chunk_tokens": self._config.chunk_tokens}
        info("cache-ready", interface="linker", page_tokens=self._page, rank=f"{rank}/{ranks}", **settings)

    def _engines(self) -> list[CacheEngine]:
        return [] if self._engine is None else [self._engine]

    def _weights_changed(self) -> None:
        self._release()  # hits found so far are of the old weights
        super()._weights_changed()

    # ---------------------------------------------------------------- tokens, from hooks

    def asking(self, text: Text, device_tokens: int, tree: Any) -> None:
        """See `compat.Listener`."""
        self._asked, self._tree = (text, device_tokens), tree

    def offering(self, text: Text, slots: torch.Tensor) -> None:
        """See `compat.Listener`."""
        self._offered = text, slots

    # ---------------------------------------------------------------- loading

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Returns every number of further pages that can be loaded. SGLang repeats the lookup each time it considers a waiting
        request; the second lookup starts to prefetch hits on lower tiers into DRAM."""
        asked, self._asked = self._asked, None
        if asked is None:
            return []
        text, device_tokens = asked
        return self._safely("lookup", [], lambda: self._lookup(rid, text, device_tokens))

    def _lookup(self, rid: str, text: Text, device_tokens: int) -> list[int]:
        engine, now = self._engine, time.monotonic()
        if engine is None:
            return []
        self._forget_before(now)
        known = self._waiting.get(rid)
        if known is None or not known.is_about(text, device_tokens):
            if known is not None:
                self._waiting.pop(rid).hit.release()
            hit = engine.lookup(text.tokens, salt=text.salt, lora=text.extra)
            known = self._waiting[rid] = _Waiting(text, device_tokens, hit, now + self._config.lease_s / 2)
        elif not known.fetching and known.hit.by_tier.keys() - {"dram"}:
            known.fetching = True
            engine.prefetch(known.hit, skip=device_tokens)
        return list(range(1, max(0, known.hit.tokens - device_tokens) // self._page + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Fills the device slots; returns whether all are filled on every rank. If not, SGLang computes them."""
        waiting = self._waiting.pop(rid, None)
        filled = waiting is not None and self._safely("load", False, lambda: self._load(waiting, transfers))
        return filled if self._tree is None else compat.agreed(self._tree, filled)

    def _load(self, waiting: _Waiting, transfers: Sequence[PoolTransfer]) -> bool:
        assert self._engine is not None
        with waiting.hit as hit, self._forward_pass():
            [target] = [t.device_indices for t in transfers if t.name == PoolName.KV]
            first, last = waiting.device_tokens, waiting.device_tokens + len(target)
            if last > hit.tokens:
                return False
            slots = torch.full((hit.tokens,), -1, dtype=torch.int64)
            slots[first:last] = target.to("cpu")
            return self._engine.retrieve(hit, self._pool.kv, slots, skip=first) >= last

    def start_layer_wise_loading(self) -> int:
        """Returns 0: all loads have completed."""
        return 0

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Returns True: `load` has already checked them."""
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Returns True: no load is in progress."""
        return True

    def _forget_before(self, now: float) -> None:
        """Releases hits whose lease ended at `now`: SGLang did not look these requests up again."""
        while self._waiting and next(iter(self._waiting.values())).until <= now:
            self._waiting.popitem(last=False)[1].hit.release()

    def _forward_pass(self) -> AbstractContextManager[Any]:
        """Returns the forward stream as a context: copies wait for the running forward pass, which may still use freed slots."""
        if self.forward_stream is None or self._pool.device.type == "cpu":
            return nullcontext()
        found: AbstractContextManager[Any] = torch.get_device_module(self._pool.device).stream(self.forward_stream)
        return found

    # ---------------------------------------------------------------- storing

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queues a node of SGLang's tree to be stored; SGLang keeps its slots until the store has completed.

        Returns:
            True always, because all ranks must return the same; failures are reported by `pop_completed_offload`.
        """
        offered, self._offered = self._offered, None
        ready = self.record_offload_ready() if offered is not None and offered[1].device.type != "cpu" else []
        self._offers.append(self._storing.submit(self._safely, "store", False, lambda: self._store(offered, ready)))
        return True

    def _store(self, offered: tuple[Text, torch.Tensor] | None, ready: Sequence[Any]) -> bool:
        if offered is None or self._engine is None:
            return False
        for event in ready:
            event.synchronize()
        text, slots = offered
        chunk = self._config.chunk_tokens
        whole = min(len(text.tokens), len(slots)) // chunk * chunk
        with self._forward_pass():
            where = slots[:whole].to("cpu", torch.int64)
            self._engine.store(text.tokens[:whole], self._pool.kv, where, salt=text.salt, lora=text.extra)
        return True

    def num_completed_offloads(self) -> int:
        """Returns the number of leading stores that have completed and are not popped yet."""
        return next((n for n, offer in enumerate(self._offers) if not offer.done()), len(self._offers))

    def pop_completed_offload(self) -> bool:
        """Returns whether the oldest store succeeded, and removes it."""
        return self._offers.popleft().result()

    # ---------------------------------------------------------------- the end

    def reset(self) -> None:
        """Waits for pending stores and releases all hits; SGLang calls it to empty its tree."""
        wait(self._offers)
        self._offers.clear()
        self._release()

    def _release(self) -> None:
        while self._waiting:
            self._waiting.popitem()[1].hit.release()

    def close(self) -> None:
        """Completes pending stores and writes, and closes the engine. Idempotent."""
        self.reset()
        self._storing.shutdown()
        super().close()


def linker_settings(extra: Mapping[str, Any] | None, page_tokens: int) -> Config:
    """Returns the settings in `extra` and from the other sources of `Config.load`; `chunk_tokens` is rounded up to whole pages.

    Raises:
        ConfigError: a setting is unknown or impossible, or there is neither DRAM nor disk to cache in.
    """
    config = Config.load(json=dict(extra or {}))
    if config.disk_path is None and not config.dram_bytes:
        raise ConfigError("dram_bytes: 0, and no disk_path is set, so there is nowhere to keep KV; set one of them")
    return replace(config, chunk_tokens=-(-config.chunk_tokens // page_tokens) * page_tokens)
