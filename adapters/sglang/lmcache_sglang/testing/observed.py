"""Instrumented `LMCacheStorage` and `LMCacheLinker` for conformance sessions, controlled from the session's process.

SGLang's scheduler runs in its own process and does not report what its cache does, so each of them listens on a socket.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, Listener
from typing import Any

import torch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lmcache_sglang import compat
from lmcache_sglang.guard import Guarded
from lmcache_sglang.linker import LMCacheLinker
from lmcache_sglang.storage import LMCacheStorage

ADDRESS = "TEST_LMCACHE_CONTROL"
"""Environment variable: prefix of the abstract socket address; `-` and the rank are appended."""

_IDLE_SLEEP_S = 0.002
_EVERYTHING = 1 << 30
"""Number of tokens, more than any pool has."""


class Observed(Guarded):
    """Behaves like its base, except while `bypassed`: then the cache is neither read nor written."""

    bypassed = False

    def _observe(self, rank: int) -> None:
        self._tree_seen = _Tree()
        _sleep_when_idle()
        address = os.environ.get(ADDRESS)
        if address:
            listener = Listener(f"\0{address}-{rank}", "AF_UNIX")
            threading.Thread(target=self._listen, args=(listener,), daemon=True, name="lmcache-control").start()

    def _listen(self, listener: Listener) -> None:
        connection: Connection[Any, Any] = listener.accept()
        while True:
            try:
                command, value = connection.recv()
            except EOFError:
                return
            try:
                connection.send((True, self._run_command(command, value)))
            except Exception as error:
                connection.send((False, f"{type(error).__name__}: {error}"))

    def _run_command(self, command: str, value: Any) -> Any:
        if command == "settled":
            return self._tree_seen.settled()
        if command == "bypass":
            self.bypassed = value
        elif command == "cap":
            self._tree_seen.cap = value
        elif command == "flush":
            return self.flush()
        elif command == "clear":
            return self.clear(value)
        elif command == "stats":
            found: Mapping[str, float] = self.stats()
            return dict(found)
        elif command == "close":
            self.close()
        else:
            raise ValueError(f"unknown command {command!r}")
        return None


class ObservedStorage(Observed, LMCacheStorage):
    """The instrumented HiCache backend."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        LMCacheStorage.__init__(self, storage_config, kwargs)
        self._observe(int(storage_config.tp_rank))

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """See the base class."""
        return 0 if self.bypassed else super().batch_exists(keys, extra_info)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """See the base class."""
        return [True] * len(keys) if self.bypassed else super().batch_set_v1(keys, host_indices, extra_info)


class ObservedLinker(Observed, LMCacheLinker):
    """The instrumented linker."""

    def __init__(self, server_args: Any, params: Any, **named: Any) -> None:
        LMCacheLinker.__init__(self, server_args, params, **named)
        self._observe(compat.rank_of(params)[0])

    def asking(self, text: compat.Text, device_tokens: int, tree: Any) -> None:
        """See the base class."""
        if not self.bypassed:
            super().asking(text, device_tokens, tree)

    def offering(self, text: compat.Text, slots: torch.Tensor) -> None:
        """See the base class."""
        if not self.bypassed:
            super().offering(text, slots)


def _sleep_when_idle() -> None:
    """Makes idle schedulers sleep: SGLang's busy-wait, and test runs have several of them on few cores."""
    plain = Scheduler.on_idle

    def on_idle(scheduler: Any) -> None:
        plain(scheduler)
        time.sleep(_IDLE_SLEEP_S)

    Scheduler.on_idle = on_idle


class _Tree:
    """Instruments SGLang's own radix cache. With a `cap`, the next request finds at most that many tokens of its prompt, and
    everything beyond is evicted from the device. Otherwise a request that recomputes these pages would decode from the old
    ones as soon as it inserts its own.
    """

    def __init__(self) -> None:
        self._cap: int | None = None
        self._fresh = False
        self._cache: Any = None
        plain = UnifiedRadixCache.match_prefix

        def match_prefix(cache: Any, params: Any) -> Any:
            self._cache = cache
            if self._cap is not None and len(params.key) > self._cap:
                params.key = params.key[: self._cap]
            found = plain(cache, params)
            if self._fresh:
                self._fresh = False
                lock = cache.lock(found.last_device_node)
                cache.evict(EvictParams(num_tokens=_EVERYTHING))
                cache.unlock(lock)
            return found

        UnifiedRadixCache.match_prefix = match_prefix

    @property
    def cap(self) -> int | None:
        """Maximum number of tokens found, or None; see the class."""
        return self._cap

    @cap.setter
    def cap(self, tokens: int | None) -> None:
        self._cap, self._fresh = tokens, tokens is not None

    def settled(self) -> bool:
        """Returns whether no copy between device, host and storage is pending."""
        cache = self._cache
        if cache is None:
            return True
        if cache.linker is not None:
            return not cache.linker.pending_offloads and not cache.linker.inflight_load_rids
        control = cache.cache_controller
        waiting = (cache.ongoing_write_through, cache.ongoing_backup, cache.ongoing_prefetch, cache.ongoing_load_back)
        return not any(waiting) and control.backup_queue.empty() and control.ack_backup_queue.empty()
