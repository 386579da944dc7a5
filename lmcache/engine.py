"""`CacheEngine`: a tiered KV cache for one model on one rank, with a blocking, thread-safe API.

A store gathers the caller's KV into DRAM and returns; write-back to lower tiers happens in the background. A lookup leases what
it found, which protects it from eviction until it is released. A retrieve copies it into the caller's KV and returns how many
tokens are in place. Internal failures are misses, counted and logged; only wrong calls raise.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch

from lmcache.adapter import describe
from lmcache.config import Config
from lmcache.control.outcomes import FlushResult, Lookup, Owner, StopReason, TierInfo
from lmcache.control.plane import Plane
from lmcache.driver import Driver
from lmcache.errors import LMCacheError, SlotError, TierError
from lmcache.keys import Extra, TokenIds, as_tokens
from lmcache.layout import BoundKV, PagedKV, validate_slots
from lmcache.observe.log import Throttle, info
from lmcache.observe.metrics import Metrics
from lmcache.plan import Chain, JobKind, Name
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier, usable_bytes
from lmcache.transfer.jobs import EngineView
from lmcache.transfer.rank import CLOSE_S, open_rank

__all__ = ["CacheEngine", "Hit", "LayerLoad"]

T = TypeVar("T")
Slots = torch.Tensor | Mapping[int, torch.Tensor]
"""int64, one slot per token; with several groups a mapping group → such a tensor. −1 = not resident."""

_WRITING: tuple[JobKind, ...] = ("store", "write_back", "delete")
"""Jobs that change the tiers below DRAM, including deletes, after which a deferred write-back may follow."""

_HUNG_S = 0.2
"""Seconds that closing waits for threads once their tier was seen to hang."""

_FAILED = Lookup("miss", 0, {}, StopReason.FAILED)


class Hit:
    """Result of a lookup, leased until it is released: use it as a context manager, or call `release`.

    Attributes:
        tokens: how many leading tokens can be retrieved; a multiple of `chunk_tokens`.
        by_tier: tokens by source, e.g. `{"dram": 2048, "disk": 512}`.
        stop: why the hit ends there, see `StopReason`.
        group: the layer group that ends it, for `StopReason.GROUP`.
    """

    def __init__(self, driver: Driver, owner: Owner, found: Lookup) -> None:
        self.tokens = found.tokens
        self.by_tier = dict(found.by_tier)
        self.stop = found.stop
        self.group = found.group
        self.owner = owner
        self._driver = driver
        self._process = os.getpid()
        self._released = False

    def of(self, driver: Driver) -> bool:
        """Whether this hit was found by `driver`."""
        return self._driver is driver

    @property
    def inherited(self) -> bool:
        """Whether this process was forked after the hit was found: then nothing can be loaded."""
        return os.getpid() != self._process

    def release(self) -> None:
        """Releases the lease. Idempotent."""
        released, self._released = self._released, True
        if not released and not self.inherited:
            self._driver.release(self.owner)

    def __enter__(self) -> Hit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Hit(tokens={self.tokens}, by_tier={self.by_tier}, stop={self.stop.value!r})"


class LayerLoad:
    """The result of `CacheEngine.retrieve_layers`, complete from the start."""

    def __init__(self, loaded: int, expected: int) -> None:
        self._loaded = loaded
        self._whole = loaded == expected

    def wait(self, layer: int, *, group: int = 0, timeout: float | None = None) -> bool:
        """Returns whether this layer is in place for all tokens of the hit."""
        return self._whole

    def finish(self) -> int:
        """Returns the number of tokens loaded. If fewer than the hit, the slots beyond are undefined: recompute from there."""
        return self._loaded


class CacheEngine:
    """A tiered KV cache for one model on one rank.

    Args:
        config: settings; `Config.load()` (environment and file) by default.
        spec: groups, layers, heads and dtypes of the KV.
        tiers: the tiers below DRAM, nearest first; by default those in `config` (disk).

    Raises:
        ConfigError, SpecError: invalid settings or spec.
        TierError: a tier cannot be opened and `config.strict` is set; otherwise the cache runs without it.
    """

    def __init__(self, config: Config | None, spec: KVSpec, *, tiers: Sequence[Tier] | None = None) -> None:
        self.config = config if config is not None else Config.load()
        spec.validate()
        self.spec = spec
        self._chunk = self.config.chunk_tokens
        self._tiers = tiers
        self._closed = False
        self._opening = threading.Lock()
        self._open(tiers)
        self._process = os.getpid()

    def _open(self, tiers: Sequence[Tier] | None) -> None:
        """Opens the cache in this process."""
        self.metrics = Metrics()
        self._log = Throttle()
        self._rank = open_rank(self.config, self.spec, self.metrics, self._log, tiers=tiers)
        self.memory = self._rank.memory
        found = [TierInfo(tier.name, tier.shared, usable_bytes(tier)) for tier in self._rank.tiers]
        self._plane = Plane(self.config, [self.spec], self._rank.slots, found, self.metrics)
        self._names = self._plane.names
        self._driver = Driver(self._plane, self._rank, probe_timeout=self.config.probe_timeout_s)
        for position, tier in enumerate(self._rank.tiers):
            if not tier.shared:  # no other process adds objects: the index can list its contents once
                ids = (found.id for found in tier.scan())
                self._driver.announce(position, [Name(i.namespace, i.chain, i.group, i.tokens, i.depth) for i in ids])
        info("cache-open", memory=self.memory, slots=list(self._rank.slots), tiers=[t.name for t in self._rank.tiers])

    def _follow_fork(self) -> None:
        """In a forked child, opens an empty cache on the same tiers.

        The child has none of its parent's threads, and the parent's other threads may have held any lock of the cache when it
        forked. Nothing of what the child inherited is used, except for the weights version.
        """
        if os.getpid() == self._process:
            return
        with self._opening:
            if os.getpid() == self._process:
                return
            version = self._names.weights_version
            try:
                self._open(self._tiers)
            except TierError as error:  # `strict` is about the start; here a request waits
                self._open([])
                self._log.warning("tier-disabled", reason=error)
            self._names.set_weights_version(version)
            self._process = os.getpid()  # last: until then other threads wait above
            self._log.warning(
                "cache-forked", reason="a forked child starts with an empty cache in memory, of the same size"
            )

    # ---------------------------------------------------------------- names

    def namespace(self, *, salt: str = "", lora: str = "", scope: str = "") -> bytes:
        """Returns the namespace of this model's KV for a tenant and LoRA, under the current weights version.

        `scope` separates names that are not derived from tokens, see `lmcache.keyed`.
        """
        self._follow_fork()
        return self._names.of(salt, lora, scope)

    def set_weights_version(self, version: str | int) -> None:
        """Call when the weights change under one model name (RL step, hot reload): nothing stored before is found again."""
        self._follow_fork()
        self._names.set_weights_version(str(version))

    # ---------------------------------------------------------------- store

    def store(
        self,
        tokens: TokenIds,
        kv: PagedKV,
        slots: Slots,
        *,
        salt: str = "",
        lora: str = "",
        extras: Sequence[Extra] = (),
    ) -> int:
        """Stores the KV of `tokens`; on return the engine may overwrite it. Write-back to lower tiers is asynchronous.

        Args:
            tokens: the whole sequence from its first token.
            kv: the engine's live tensors.
            slots: slot of each token; a chunk with a −1 among its slots is not stored for that group.
            salt, lora, extras: see `lmcache.keys`.

        Returns:
            Number of tokens newly accepted: 0 if all were cached already, or nothing could be evicted for them.
            `lmcache_skipped_stores_total` counts why chunks were skipped.

        Raises:
            TokenError, SlotError, LayoutError, SpecError: a wrong call; nothing was copied.
        """
        self._follow_fork()
        with self.metrics.timed("store"):
            return self._store(self._names.chain(as_tokens(tokens), salt, lora, extras), kv, slots)

    def store_chain(self, chain: Chain, kv: PagedKV, slots: Slots) -> int:
        """Like `store`, for an engine with its own names, see `lmcache.keyed`."""
        self._follow_fork()
        with self.metrics.timed("store"):
            return self._store(chain, kv, slots)

    def _store(self, chain: Chain, kv: PagedKV, slots: Slots) -> int:
        if self._closed:
            return 0
        bound = kv.bind(self.spec)
        by_group = self._slots(bound, slots, len(chain.digests) * self._chunk, unique=False)
        resident = [
            (by_group[group] >= 0).view(-1, self._chunk).all(1).tolist()  # one value per chunk
            for group in range(len(by_group))
        ]
        store = self._safely("store", None, partial(self._driver.store, chain, EngineView(bound, by_group), resident))
        return store.accepted if store is not None else 0

    # ---------------------------------------------------------------- lookup

    def lookup(
        self,
        tokens: TokenIds,
        *,
        salt: str = "",
        lora: str = "",
        extras: Sequence[Extra] = (),
        max_tokens: int | None = None,
    ) -> Hit:
        """Finds how many leading tokens of `tokens` can be retrieved, and leases them.

        `max_tokens` limits the hit: an engine that must compute the last prompt token itself passes `len(tokens) - 1`.
        Tiers shared with other processes are probed, for at most `probe_timeout_s`.
        """
        self._follow_fork()
        with self.metrics.timed("lookup"):
            ids = as_tokens(tokens)
            total = len(ids)
            chain = self._names.chain(ids, salt, lora, extras)
            return self._lookup(chain, total, total if max_tokens is None else max_tokens)

    def lookup_chain(self, chain: Chain) -> Hit:
        """Like `lookup`, for an engine with its own names, see `lmcache.keyed`."""
        self._follow_fork()
        with self.metrics.timed("lookup"):
            total = len(chain.digests) * self._chunk
            return self._lookup(chain, total, total)

    def _lookup(self, chain: Chain, total: int, max_tokens: int) -> Hit:
        self._plane.record(total, chain)
        nothing: tuple[Owner, Lookup] = (0, _FAILED)
        owner, found = self._safely("lookup", nothing, partial(self._driver.lookup, chain, max_tokens))
        self._plane.count_request(total, found.tokens, found.by_tier, found.stop)
        return Hit(self._driver, owner, found)

    # ---------------------------------------------------------------- retrieve

    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        """Copies what `hit` found into the engine's KV, and waits for it.

        Args:
            hit: from `lookup` of this engine, not released yet.
            kv: the engine's live tensors.
            slots: target slot of each of the first `hit.tokens` tokens; −1 = skip this token.
            skip: number of leading tokens already resident in the engine; chunks entirely within them are not loaded.

        Returns:
            Number of leading tokens in place, including those of `skip`: 0..hit.tokens. The slots beyond are undefined:
            compute from there.

        Raises:
            SlotError, LayoutError, SpecError: a wrong call; nothing was copied.
        """
        self._follow_fork()
        with self.metrics.timed("retrieve"):
            bound = kv.bind(self.spec)
            view = EngineView(bound, self._slots(bound, slots, hit.tokens, unique=True))
            if not hit.tokens or hit.inherited:
                return 0
            if not hit.of(self._driver):
                raise SlotError("the hit was found by another engine: retrieve it from that one, or look up here")
            return self._safely("retrieve", 0, partial(self._driver.load, hit.owner, view, skip))

    def retrieve_layers(self, hit: Hit, kv: PagedKV, slots: Slots) -> LayerLoad:
        """Deprecated: calls `retrieve`, and returns its result as a `LayerLoad`."""
        warnings.warn("CacheEngine.retrieve_layers is deprecated: call retrieve", DeprecationWarning, stacklevel=2)
        return LayerLoad(self.retrieve(hit, kv, slots), hit.tokens)

    def prefetch(self, hit: Hit, *, skip: int = 0) -> None:
        """Starts to load what `hit` found on lower tiers into DRAM, without waiting. `skip` as in `retrieve`."""
        if not hit.inherited and hit.of(self._driver):
            self._safely("prefetch", None, partial(self._driver.prefetch, hit.owner, skip))

    # ---------------------------------------------------------------- flush, clear, stats, close

    def flush(self, *, durable: bool = False, timeout: float = 60.0) -> FlushResult:
        """Waits until everything stored so far is visible in the tiers below DRAM and survives kill −9.

        Objects whose write failed are written again if they are still in DRAM.

        Args:
            durable: the objects also survive power loss.
            timeout: seconds.

        Returns:
            What was written, what was there already, and what was dropped and why, since the last flush. True only if nothing was
            dropped.

        Raises:
            TierError: with `durable`, a tier could not make its objects durable.
        """
        self._follow_fork()
        result = self._driver.flush(timeout, *_WRITING)
        failed = 0
        for tier in self._rank.tiers:
            try:
                tier.flush(durable=durable)
            except Exception as error:
                if durable:
                    raise TierError(f"tier {tier.name!r} cannot make its objects durable: {describe(error)}") from error
                failed += 1
                self.metrics.failed("flush", tier.name)
                self._log.warning("flush-failed", key=tier.name, tier=tier.name, error=describe(error))
        return replace(result, dropped={**result.dropped, "flush": failed}) if failed else result

    def clear(self, salt: str | None = None) -> int:
        """Removes everything (of one tenant) from every tier; returns how many objects. None of it is served again here, and
        nothing that any process had gathered before reaches the disk afterwards.

        Without `salt` the tiers are emptied, including other models' objects in a shared folder. With it, everything is removed
        that this process has stored under that salt, for every LoRA and weights version. Other processes with an engine on the
        folder drop the same from memory at their next call after a quarter of a second.

        Raises:
            TierError: a tier could not remove some objects; they may still be served.
        """
        self._follow_fork()
        namespaces = None if salt is None else self._names.of_tenant(salt)
        removed = self._driver.clear(namespaces)
        self._driver.drain(30.0, *_WRITING)  # objects being written now would reappear
        try:
            return removed + self._rank.clear(namespaces)
        except LMCacheError:
            raise
        except Exception as error:
            raise TierError(
                f"a tier could not be cleared, its objects may still be served: {describe(error)}"
            ) from error

    def stats(self) -> dict[str, float]:
        """Returns all metrics by name, and the index's own counts as `index_*`."""
        self._follow_fork()
        index, arenas = self._driver.stats()
        self.metrics.queue(*self._rank.transfer.tier_copier.queue())
        for tier in self._rank.tiers:
            used = self._safely("stats", None, tier.used_bytes)
            if used is not None:
                self.metrics.tier(tier.name, used)
        for group, states in zip(self.spec.groups, arenas, strict=True):
            self.metrics.arena(group.name, **states)
        return self.metrics.snapshot() | {f"index_{name}": float(value) for name, value in index.items()}

    def close(self) -> None:
        """Finishes write-back, ends all threads, closes the tiers. Idempotent.

        Waits as long as objects are being written. Abandons a tier that makes no progress for a few seconds.
        """
        if (
            self._closed or os.getpid() != self._process
        ):  # a forked child that has not used the cache has nothing to close
            self._closed = True
            return
        self._closed = True
        self._plane.close()
        drained = False
        try:
            drained = self._driver.drain(CLOSE_S, *_WRITING, patient=True)
            if not drained:
                pending = self._driver.in_progress(*_WRITING)
                reason = f"no progress for {CLOSE_S:g} s: {pending} jobs dropped, what they were to write is on no tier"
                self._log.warning("close-incomplete", key="jobs", reason=reason)
        finally:  # also after an interrupt
            self._rank.close() if drained else self._rank.close(_HUNG_S)

    def __enter__(self) -> CacheEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- checks

    def _slots(self, kv: BoundKV, slots: Slots, tokens: int, *, unique: bool) -> dict[int, torch.Tensor]:
        groups = range(len(self.spec.groups))
        if isinstance(slots, torch.Tensor):
            if len(groups) > 1:
                raise SlotError(f"this spec has {len(groups)} groups: pass a mapping group -> slots")
            slots = {0: slots}
        if missing := [group for group in groups if group not in slots]:
            raise SlotError(f"no slots for group {missing[0]}; groups are numbered 0..{len(groups) - 1}")
        return {group: validate_slots(slots[group], kv.num_slots(group), tokens, unique=unique) for group in groups}

    def _safely(self, op: str, default: T, call: Callable[[], T]) -> T:
        """Returns `call()`, or `default` if the cache fails; only errors about the caller's arguments are raised."""
        try:
            return call()
        except LMCacheError:
            raise
        except Exception as error:
            self.metrics.failed(op, "internal")
            self._log.warning("internal-error", op=op, error=f"{type(error).__name__}: {error}")
            return default
