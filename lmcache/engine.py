"""`CacheEngine`: one index and one transfer in one process, thread-safe, with blocking convenience.

A store gathers the caller's KV into DRAM and returns; writing it further down happens behind the caller's back. A lookup
leases what it found, so that it stays until it was retrieved or released. A retrieve copies it into the caller's KV and says
how many tokens really arrived. Whatever fails inside is a miss, a counter and one log line; only wrong calls raise.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lmcache.config import Config
from lmcache.control import Index, TierInfo
from lmcache.control.admission import Admission
from lmcache.control.outcomes import FAILED, FAILED_BEFORE, GROUP, LATE, MAX_TOKENS, PROBING, WRITING
from lmcache.driver import ControlLoop
from lmcache.errors import LMCacheError, SlotError, TierError
from lmcache.format.codec import ObjectCodec
from lmcache.hit import Hit, LayerLoad
from lmcache.keys import Chain, Extra, Name, TokenIds, as_tokens, chain_of, namespace_of, scoped
from lmcache.layout import BoundKV, PagedKV, validate_slots
from lmcache.memory import host_provider, pinned
from lmcache.observe.log import Throttle, info
from lmcache.observe.metrics import Metrics
from lmcache.observe.recorder import Recorder
from lmcache.plan import JobKind
from lmcache.spec import KVSpec
from lmcache.tiers import open_tiers
from lmcache.tiers.base import Tier, usable_bytes
from lmcache.transfer import Transfer
from lmcache.transfer.arena import Arena, share_out
from lmcache.transfer.engine_copy import open_copier
from lmcache.transfer.jobs import EngineView

__all__ = ["CacheEngine", "Hit", "LayerLoad"]

T = TypeVar("T")
Slots = torch.Tensor | Mapping[int, torch.Tensor]
"""int64, one slot per token; with several groups a mapping group → such a tensor. −1 = not resident."""

_MISS_REASONS = {MAX_TOKENS: "tail", PROBING: "pending", WRITING: "pending", LATE: "failed", FAILED_BEFORE: "failed"}
"""The index's reasons in the metrics' coarser words; what is not listed is the same in both."""

_CHANGING: tuple[JobKind, ...] = ("store", "write_back", "delete")
"""Jobs that change the tiers below. A removal may be followed by the write that had to wait for it."""

_NAMESPACES_KEPT = 1 << 16

_CLOSE_S = 5.0
"""How long closing waits for write-behind, and then for threads, before it leaves a hung tier behind."""


class CacheEngine:
    """A tiered KV cache for one model on one rank.

    Args:
        config: settings; `Config.load()` (environment and file) by default.
        spec: what the KV is.
        tiers: the tiers below DRAM, nearest first; by default what `config` says (disk).

    Raises:
        ConfigError, SpecError: impossible settings.
        TierError: a tier cannot be opened and `config.strict` is set; otherwise the cache runs without it.
    """

    def __init__(self, config: Config | None, spec: KVSpec, *, tiers: Sequence[Tier] | None = None) -> None:
        self.config = config if config is not None else Config.load()
        spec.validate()
        self.spec = spec
        self.metrics = Metrics()
        self._log = Throttle()
        self._tiers = list(tiers) if tiers is not None else open_tiers(self.config, self.metrics, self._log)
        provider, self.memory = host_provider(self.config.pin_memory)
        chunk = self.config.chunk_tokens
        sizes = [spec.object_bytes(group, chunk) for group in range(len(spec.groups))]
        budget = self.config.dram_bytes or (self.config.queue_bytes if self._tiers else 0)
        counts = share_out(budget, sizes)
        self._arenas = [
            Arena(n, size, provider, reserve=provider is pinned) for n, size in zip(counts, sizes, strict=True)
        ]
        self._admission = Admission(self.config, [spec], chunk, [usable_bytes(tier) for tier in self._tiers])
        self._index = Index(
            [(group.name, group.rule) for group in spec.groups],
            chunk,
            counts,
            tiers=[TierInfo(tier.name, tier.shared) for tier in self._tiers],
            policy=self.config.policy,
            lease_ttl=self.config.lease_s,
            load_deadline=self.config.load_timeout_s,
            probe_deadline=self.config.probe_timeout_s,
            admit=self._admission if self._admission.active else None,
        )
        self._transfer = Transfer(
            spec,
            chunk,
            self._arenas,
            self._tiers,
            io=ObjectCodec(spec, chunk, order=self.config.disk_order, reslice=self.config.share == "semantic"),
            metrics=self.metrics,
            log=self._log,
            read_threads=self.config.io_threads,
            write_threads=self.config.io_threads,
            queue_bytes=self.config.queue_bytes,
            open_copier=partial(
                open_copier,
                staging_bytes=self.config.staging_bytes,
                copy_engine_bytes=self.config.copy_engine_bytes,
            ),
        )
        self._lock = threading.RLock()
        self._owners = itertools.count(1)
        self._loop = ControlLoop(
            self._index, self._transfer, self.metrics, self._admission if self._admission.active else None
        )
        if self._admission.active:
            for position in self._admission.bounded:
                self._transfer.look(position)
            self._admission.measured(0, self._transfer.facts())
        self._weights_version = ""
        self._namespaces: dict[tuple[str, str, str], bytes] = {}
        self._outdated: list[tuple[str, bytes]] = []  # (salt, namespace) of earlier weights versions
        self._recorder = Recorder(self.config.record_trace, chunk) if self.config.record_trace else None
        self._closed = False
        for position, tier in enumerate(self._tiers):
            if not tier.shared:  # nobody else adds to it: what it holds now is all there is to know
                names = [Name(f.id.namespace, f.id.chain, f.id.group, f.id.tokens, f.id.depth) for f in tier.scan()]
                self._index.announce(position, 0, names, True, time.monotonic())
        info("cache-open", memory=self.memory, slots=counts, tiers=[t.name for t in self._tiers])

    # ---------------------------------------------------------------- names

    def namespace(self, *, salt: str = "", lora: str = "", scope: str = "") -> bytes:
        """The namespace of this model's KV for a tenant and LoRA, under the current weights version.

        `scope` sets apart names that are not made from tokens, see `Objects`.
        """
        key = (salt, lora, scope)
        found = self._namespaces.get(key)
        if found is None:
            with self._lock:  # a name made for earlier weights must not be remembered once they have changed
                found = namespace_of(
                    self.spec,
                    chunk_tokens=self.config.chunk_tokens,
                    salt=salt,
                    lora=lora,
                    weights_version=self._weights_version,
                    share=self.config.share,
                )
                if scope:
                    found = scoped(found, scope)
                if len(self._namespaces) >= _NAMESPACES_KEPT:  # a salt per request must not fill the memory
                    self._namespaces.pop(next(iter(self._namespaces)))
                self._namespaces[key] = found
        return found

    def _chain(self, ids: npt.NDArray[np.uint32], salt: str, lora: str, extras: Sequence[Extra]) -> Chain:
        return chain_of(self.namespace(salt=salt, lora=lora), ids, self.config.chunk_tokens, extras)

    def set_weights_version(self, version: str | int) -> None:
        """The weights changed under one name (RL step, hot reload): nothing stored before is found any more."""
        with self._lock:
            self._weights_version = str(version)
            self._outdated = [*self._outdated, *((salt, ns) for (salt, *_), ns in self._namespaces.items())]
            self._outdated = self._outdated[-_NAMESPACES_KEPT:]
            self._namespaces.clear()

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
        """Keep the KV of `tokens`; on return the engine may overwrite it. Writing to lower tiers goes on behind.

        Args:
            tokens: the whole sequence from its first token.
            kv: the engine's live tensors.
            slots: where each token's KV lies; chunks with a −1 among their slots are left out of that group.
            salt, lora, extras: see `lmcache.keys`.

        Returns:
            Tokens newly taken in: 0 if all of them were there already, or there was no room. See
            `lmcache_skipped_stores_total` for why chunks were left out.

        Raises:
            TokenError, SlotError, LayoutError, SpecError: a wrong call; nothing was moved.
        """
        with self.metrics.timed("store"):
            ids = as_tokens(tokens)
            chain = self._chain(ids, salt, lora, extras)
            return self._store_chain(chain, kv, slots)

    def store_chain(self, chain: Chain, kv: PagedKV, slots: Slots) -> int:
        """`store` for an engine that brings its own names, see `lmcache.keyed`."""
        with self.metrics.timed("store"):
            return self._store_chain(chain, kv, slots)

    def _store_chain(self, chain: Chain, kv: PagedKV, slots: Slots) -> int:
        bound = kv.bind(self.spec)
        chunk = self.config.chunk_tokens
        whole = len(chain.digests) * chunk
        by_group = self._slots(bound, slots, whole, unique=False)
        return self._safely("store", 0, lambda: self._store(chain, bound, by_group))

    def _store(self, chain: Chain, kv: BoundKV, slots: Mapping[int, torch.Tensor]) -> int:
        resident = [self._resident(slots[group]) for group in range(len(self.spec.groups))]
        owner = next(self._owners)
        last = len(chain.digests)
        self._loop.turn()
        store, plan = self._loop.ask(
            lambda index, now: index.begin_store(owner, chain, first=0, last=last, now=now, resident=resident)
        )
        for reason, count in store.skipped.items():
            self.metrics.skipped_store(reason, count)
        self._loop.execute(plan, {} if store.job is None else {store.job: EngineView(kv, slots)})
        self._loop.turn()
        if store.job is not None:
            self.metrics.stored(
                sum(len(job.ops) for job in plan.jobs if job.id == store.job) * self.config.chunk_tokens
            )
        return store.accepted

    def _resident(self, slots: torch.Tensor) -> list[bool]:
        present: list[bool] = (slots >= 0).view(-1, self.config.chunk_tokens).all(1).tolist()  # one value per chunk
        return present

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
        """How many leading tokens of `tokens` can be retrieved.

        `max_tokens` caps it: an engine that must compute the last prompt token itself passes `len(tokens) - 1`.
        Tiers that other processes share are asked, for at most `probe_timeout_s`.
        """
        with self.metrics.timed("lookup"):
            ids = as_tokens(tokens)
            chain = self._chain(ids, salt, lora, extras)
            if self._recorder is not None:
                self._recorder.record(len(ids), chain.digests)
            hit = self._find(chain, len(ids) if max_tokens is None else max_tokens)
        self._count(hit, len(ids))
        return hit

    def lookup_chain(self, chain: Chain) -> Hit:
        """`lookup` for an engine that brings its own names, see `lmcache.keyed`."""
        total = len(chain.digests) * self.config.chunk_tokens
        with self.metrics.timed("lookup"):
            if self._recorder is not None:
                self._recorder.record(total, chain.digests)
            hit = self._find(chain, total)
        self._count(hit, total)
        return hit

    def _find(self, chain: Chain, max_tokens: int) -> Hit:
        owner = next(self._owners)
        hit = self._safely("lookup", None, lambda: self._lookup(owner, chain, max_tokens))
        return hit if hit is not None else Hit(self, owner, 0, {}, FAILED)

    def _count(self, hit: Hit, total: int) -> None:
        self.metrics.requested(total)
        for tier, tokens in hit.by_tier.items():
            self.metrics.hit(tier, tokens)
        if hit.tokens < total:
            whole = total - total % self.config.chunk_tokens
            reason = "group" if hit.stop.startswith(GROUP) else _MISS_REASONS.get(hit.stop, hit.stop)
            if hit.tokens < whole:
                self.metrics.missed(reason, whole - hit.tokens)
            if total > whole:
                self.metrics.missed("tail", total - whole)

    def _lookup(self, owner: int, chain: Chain, max_tokens: int) -> Hit:
        self._loop.turn()
        while True:
            seen = self._loop.news
            found, plan = self._loop.ask(lambda index, now: index.lookup(owner, chain, max_tokens, now))
            self._loop.execute(plan)
            if found.status != "pending":
                return Hit(self, owner, found.tokens, found.by_tier, found.stop)
            self._loop.wait(seen, self.config.probe_timeout_s)  # after it, the index no longer waits for the answer

    def _release(self, owner: int) -> None:
        self._loop.tell(lambda index, now: index.forget(owner))

    # ---------------------------------------------------------------- retrieve

    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        """Copy what `hit` found into the engine's KV, and wait for it.

        Args:
            hit: from `lookup` of this engine, not released yet.
            kv: the engine's live tensors.
            slots: where each of the first `hit.tokens` tokens goes; −1 = leave this token out.
            skip: leading tokens that the engine has already: chunks that lie wholly within them are not read.

        Returns:
            Leading tokens that are in place, those of `skip` among them: 0..hit.tokens. The slots beyond are undefined:
            compute from there.

        Raises:
            SlotError, LayoutError, SpecError: a wrong call; nothing was moved.
        """
        with self.metrics.timed("retrieve"):
            bound = kv.bind(self.spec)
            by_group = self._slots(bound, slots, hit.tokens, unique=True)
            view = EngineView(bound, by_group)
            return self._safely("retrieve", 0, lambda: self._loop.result(self._begin_load(hit, view, skip)))

    def retrieve_layers(self, hit: Hit, kv: PagedKV, slots: Slots) -> LayerLoad:
        """Like `retrieve`, but returns at once: layer *i + 1* loads while the caller computes layer *i*."""
        bound = kv.bind(self.spec)
        by_group = self._slots(bound, slots, hit.tokens, unique=True)
        layers = {g: len(self.spec.local_layers(g)) for g in range(len(self.spec.groups))}
        load = LayerLoad(self._loop, layers, self.config.load_timeout_s)
        view = EngineView(bound, by_group, load._layer_done)
        load._job = self._safely("retrieve", None, lambda: self._begin_load(hit, view))
        return load

    def prefetch(self, hit: Hit, *, skip: int = 0) -> None:
        """Start to bring what `hit` found on lower tiers into DRAM; returns at once. `skip` as in `retrieve`."""

        def begin() -> None:
            self._loop.turn()
            _, plan = self._loop.ask(lambda index, now: index.begin_prefetch(hit.owner, now, skip=skip))
            self._loop.execute(plan)

        self._safely("prefetch", None, begin)

    def _begin_load(self, hit: Hit, view: EngineView, skip: int = 0) -> int | None:
        if hit.tokens == 0:
            return None
        self._loop.turn()
        job, plan = self._loop.ask_for_job(lambda index, now: index.begin_load(hit.owner, now, skip=skip))
        self._loop.execute(plan, {} if job is None else {job: view})
        return job

    # ---------------------------------------------------------------- the rest

    def flush(self, *, durable: bool = False, timeout: float = 60.0) -> bool:
        """Wait until everything stored so far is visible in the tiers below and safe from kill −9.

        `durable=True` also survives power loss. False if a tier was too slow.
        """
        done = self._loop.settle(timeout, *_CHANGING)
        for tier in self._tiers:
            done = self._safely("flush", False, partial(_flush, tier, durable)) and done
        return done

    def clear(self, salt: str | None = None) -> int:
        """Drop everything (of one tenant) from every tier; returns how many objects went. Nothing of it is served again.

        Without `salt` the tiers are emptied, other models' objects in a shared folder included. With it, everything goes
        that this process has stored or looked for under that salt, whatever the LoRA and weights version.

        Raises:
            TierError: a tier could not let go of some of them; they may still be served.
        """
        with self._lock:
            names: list[bytes | None] = [None]
            if salt is not None:
                self.namespace(salt=salt)
                names = [found for (owner, *_), found in self._namespaces.items() if owner == salt]
                names += [found for owner, found in self._outdated if owner == salt]
        gone = self._loop.tell(lambda index, now: sum(index.clear(name, now) for name in names))
        self._loop.settle(30.0, *_CHANGING)  # what is being written now would come back
        for position, tier in enumerate(self._tiers):
            gone += sum(tier.clear(name) for name in names)
            kept = sum(1 for found in tier.scan() if salt is None or found.id.namespace in names)
            if kept:
                raise TierError(
                    f"{kept} objects are still on tier {tier.name!r} and may be served: "
                    "stop whoever is writing to it, or make it writable, and clear again"
                )
            if position in self._admission.bounded:
                self._transfer.look(position)
        return gone

    def stats(self) -> dict[str, float]:
        """All metrics by name, and the index's own counts as `index_*`."""
        self._loop.turn()
        self.metrics.queue(*self._transfer.queue())
        for tier in self._tiers:
            self.metrics.tier(tier.name, tier.used_bytes())
        index, arenas = self._loop.tell(lambda index, now: (index.stats(), index.arenas()))
        for group, states in zip(self.spec.groups, arenas, strict=True):
            self.metrics.arena(group.name, **states)
        return self.metrics.snapshot() | {f"index_{name}": float(value) for name, value in index.items()}

    def close(self) -> None:
        """Finish write-behind, end all threads, release the tiers. Idempotent; a hung tier is left behind after seconds."""
        if self._closed:
            return
        self._closed = True
        if self._recorder is not None:
            self._recorder.close()
        self._loop.settle(_CLOSE_S, *_CHANGING)
        if self._transfer.close(_CLOSE_S):
            for tier in self._tiers:
                tier.close()
        else:
            self._log.warning("close-incomplete", reason="a tier call still hangs; its threads are left behind")

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
        """A cache failure is a miss: only errors about the call itself leave this engine."""
        try:
            return call()
        except LMCacheError:
            raise
        except Exception as error:
            self.metrics.failed(op, "internal")
            self._log.warning("internal-error", op=op, error=f"{type(error).__name__}: {error}")
            return default


def _flush(tier: Tier, durable: bool) -> bool:
    tier.flush(durable=durable)
    return True
