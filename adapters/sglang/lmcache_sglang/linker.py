"""`LMCacheLinker`: SGLang's device pools straight to the tiers, without SGLang's host pool between. Tested with SGLang 0.5.23.

SGLang asks what of a prompt's tail can be had (`lookup`, whenever it looks at a waiting request), has it loaded when it
admits the request (`load`), and offers what requests have computed (`offload`). Its interface passes page hashes; tokens are
listened for (`compat.watch_tokens`), so that KV has the names that every other engine gives it.

A load ends before `load` returns, on every rank, or is a miss: SGLang aborts requests whose load fails later. So that this
takes little time, what lies on lower tiers is fetched into DRAM while a request waits. Storing happens on a thread of its own.
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
    """SGLang's counter of layers that have arrived, for loads that end before the forward pass begins."""

    consumer_index = -1

    def set_consumer(self, index: int) -> None:
        """See `LayerWiseLoadCounter`."""

    def wait_until(self, threshold: int) -> None:
        """See `LayerWiseLoadCounter`."""


@dataclass
class _Waiting:
    """A request that SGLang has asked about: what was found, until when that is kept, whether it is being fetched."""

    text: Text
    device_tokens: int
    hit: Hit
    until: float
    fetching: bool = False

    def answers(self, text: Text, device_tokens: int) -> bool:
        """Whether it was about the same: users name requests as they like, and one that lost its place has more tokens."""
        return (
            self.device_tokens == device_tokens
            and self.text[1:] == text[1:]
            and np.array_equal(self.text.tokens, text.tokens)
        )


class LMCacheLinker(Guarded, UnifiedCacheLinker):
    """By `--enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic`.

    Args:
        server_args, forward_stream: SGLang's.
        params: SGLang's `CacheInitParams`.
        components: what its tree keeps for each node.
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
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()  # as they expire
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
        )
        compat.watch_weights(self._weights_changed)
        compat.watch_tokens()
        self._engine = CacheEngine(self._config, self._pool.spec)
        said = {**self._said(), "chunk_tokens": self._config.chunk_tokens}
        info("cache-ready", interface="linker", page_tokens=self._page, rank=f"{rank}/{ranks}", **said)

    def _engines(self) -> list[CacheEngine]:
        return [] if self._engine is None else [self._engine]

    def _weights_changed(self) -> None:
        self._release()  # what was found is of the weights before
        super()._weights_changed()

    # ---------------------------------------------------------------- what SGLang does not pass along

    def asking(self, text: Text, device_tokens: int, tree: Any) -> None:
        """See `compat.Listener`."""
        self._asked, self._tree = (text, device_tokens), tree

    def offering(self, text: Text, slots: torch.Tensor) -> None:
        """See `compat.Listener`."""
        self._offered = text, slots

    # ---------------------------------------------------------------- loading

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every number of further pages that can be restored. SGLang asks again each time it looks at a waiting request: the
        second time, what lies on lower tiers is on its way into DRAM."""
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
        if known is None or not known.answers(text, device_tokens):
            if known is not None:
                self._waiting.pop(rid).hit.release()
            hit = engine.lookup(text.tokens, salt=text.salt, lora=text.extra)
            known = self._waiting[rid] = _Waiting(text, device_tokens, hit, now + self._config.lease_s / 2)
        elif not known.fetching and known.hit.by_tier.keys() - {"dram"}:
            known.fetching = True
            engine.prefetch(known.hit, skip=device_tokens)
        return list(range(1, max(0, known.hit.tokens - device_tokens) // self._page + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Fill the device slots; True if all of them are, on every rank. Otherwise SGLang computes them."""
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
        """All loads have ended by now."""
        return 0

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """They were checked when they ended."""
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Nothing writes to its slots any more."""
        return True

    def _forget_before(self, now: float) -> None:
        """Let go of what was found for requests that SGLang never asked about again."""
        while self._waiting and next(iter(self._waiting.values())).until <= now:
            self._waiting.popitem(last=False)[1].hit.release()

    def _forward_pass(self) -> AbstractContextManager[Any]:
        """Copies go in line with the forward passes: freed slots may still be in use by the one under way."""
        if self.forward_stream is None or self._pool.device.type == "cpu":
            return nullcontext()
        found: AbstractContextManager[Any] = torch.get_device_module(self._pool.device).stream(self.forward_stream)
        return found

    # ---------------------------------------------------------------- storing

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Take in what a node of SGLang's tree holds; SGLang keeps it in place until we are done with it. Always True: every
        rank has to say the same, and what could not be stored is reported as such when its turn comes."""
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
        """Offers that have ended and that SGLang has not heard of yet."""
        return next((n for n, offer in enumerate(self._offers) if not offer.done()), len(self._offers))

    def pop_completed_offload(self) -> bool:
        """How the oldest of them ended."""
        return self._offers.popleft().result()

    # ---------------------------------------------------------------- the end

    def reset(self) -> None:
        """SGLang empties its tree: nothing of it is read or written any more."""
        wait(self._offers)
        self._offers.clear()
        self._release()

    def _release(self) -> None:
        while self._waiting:
            self._waiting.popitem()[1].hit.release()

    def close(self) -> None:
        """Write out what waits. Idempotent."""
        self.reset()
        self._storing.shutdown()
        super().close()


def linker_settings(extra: Mapping[str, Any] | None, page_tokens: int) -> Config:
    """Our settings among what SGLang was given, and from the other sources that `Config.load` knows; a chunk is made of pages.

    Raises:
        ConfigError: an unknown or impossible setting, or nowhere to keep anything.
    """
    config = Config.load(json=dict(extra or {}))
    if config.disk_path is None and not config.dram_bytes:
        raise ConfigError("dram_bytes: 0, and no disk_path is set, so there is nowhere to keep KV; set one of them")
    return replace(config, chunk_tokens=-(-config.chunk_tokens // page_tokens) * page_tokens)
