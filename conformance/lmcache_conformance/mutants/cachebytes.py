"""Caches that copy the wrong bytes, or the right ones too late."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from lmcache import CacheEngine, PagedKV
from lmcache.control.outcomes import FlushResult
from lmcache.engine import Hit, Slots
from lmcache_conformance.labs.kv_pool import CHUNK
from lmcache_conformance.mutants import BEYOND, mutant, skip_row
from lmcache_conformance.mutants.brokencache import BrokenCacheTests


class _FromTheEnd(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        if isinstance(slots, torch.Tensor) and hit.tokens:
            slots = slots[: hit.tokens].view(-1, CHUNK).flip(0).reshape(-1)
        return super().retrieve(hit, kv, slots, skip=skip)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantLastChunkFirst(BrokenCacheTests):
    """Pairs chunks with the engine's blocks in reverse order."""

    cache_class = _FromTheEnd


class _StoresBlockZero(CacheEngine):
    def store(self, tokens: Any, kv: PagedKV, slots: Slots, **names: Any) -> int:
        if isinstance(slots, torch.Tensor):
            slots = slots.clamp(min=0)
        return super().store(tokens, kv, slots, **names)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantStoresThePlaceholder(BrokenCacheTests):
    """Stores slot 0 in place of a slot that is not resident."""

    cache_class = _StoresBlockZero


class _LoadsBlockZero(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        if isinstance(slots, torch.Tensor) and bool((slots == -1).any()) and not bool((slots == 0).any()):
            slots = slots.clone()
            slots[int((slots == -1).nonzero()[0])] = 0
        return super().retrieve(hit, kv, slots, skip=skip)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantLoadsIntoThePlaceholder(BrokenCacheTests):
    """Loads a token that has no slot into slot 0."""

    cache_class = _LoadsBlockZero


class _FirstGroupOnly(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        if not isinstance(slots, torch.Tensor):
            slots = {group: s if group == 0 else torch.full_like(s, -1) for group, s in slots.items()}
        return super().retrieve(hit, kv, slots, skip=skip)


@mutant(
    row="side state (sliding window, Mamba, sparse index) not restored with the hit",
    project="SGLang #38031, LMCache #4247",
)
class MutantWindowIsNotRestored(BrokenCacheTests):
    """Loads only the first layer group."""

    cache_class = _FirstGroupOnly


class _Later(CacheEngine):
    def store(self, tokens: Any, kv: PagedKV, slots: Slots, **names: Any) -> int:
        def work() -> None:
            time.sleep(0.01)
            super(_Later, self).store(tokens, kv, slots, **names)

        thread = threading.Thread(target=work)
        self.__dict__.setdefault("_pending", []).append(thread)
        thread.start()
        return len(tokens) // CHUNK * CHUNK

    def lookup(self, tokens: Any, **names: Any) -> Hit:
        self._settle()
        return super().lookup(tokens, **names)

    def flush(self, *, durable: bool = False, timeout: float = 60.0) -> FlushResult:
        self._settle()
        return super().flush(durable=durable, timeout=timeout)

    def close(self) -> None:
        self._settle()
        super().close()

    def _settle(self) -> None:
        for thread in self.__dict__.pop("_pending", []):
            thread.join()


@mutant(row=BEYOND + "a store goes on reading after it has returned", project="the host's half of vLLM #45704")
class MutantReadsTooLate(BrokenCacheTests):
    """Copies in a background thread, while the caller may overwrite the source."""

    cache_class = _Later


SKIPPED = (
    skip_row(
        "store reads device memory before the compute stream has written it",
        "needs a device with streams: on a CPU the values are written before `store` is called. The opposite case, a copy "
        "that is made after `store` has returned, is cachebytes.MutantReadsTooLate.",
    ),
)
