"""The data plane of one rank: executes plans, moves bytes, decides nothing.

`execute` starts a plan and never waits for a tier: copies between engine memory and arena slots happen at once, in large
batches; tier calls go to worker threads. `poll` answers with what the index has not acknowledged yet. `fence` waits until
jobs no longer touch engine memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from threading import Lock

import torch

from lmcache.format.codec import Loaded, ObjectCodec
from lmcache.keys import Name, ObjectId
from lmcache.layout import BoundKV, ObjectLayout
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import ArenaSlot, Copy, Delete, Engine, Plan, Probe, Status, TierFacts
from lmcache.plan import Tier as TierPlace
from lmcache.spec import KVSpec
from lmcache.tiers.base import Result, Tier
from lmcache.transfer.arena import Arena
from lmcache.transfer.engine_copy import Completion, EngineCopier, StagingFullError, open_copier
from lmcache.transfer.jobs import ActiveJob, EngineView, JobTracker, SlotKey
from lmcache.transfer.tier_stats import Meter
from lmcache.transfer.workers import Workers
from lmcache_kernels import fallbacks

__all__ = ["EngineView", "Transfer"]

_ALARMS = frozenset({Status.CORRUPT, Status.FAILED, Status.FULL, Status.LATE})
"""Statuses worth a warning; a vanished object or a cancelled op is everyday business."""

_MEASURE_S = 0.25
"""Seconds between two measurements of how full a tier is, on its own threads."""


class Transfer:
    """Executes plans on one rank. What its jobs have come to is in `tracker`.

    Args:
        spec: what this rank's KV is.
        chunk_tokens: tokens per object.
        arenas: one per group, host memory.
        tiers: nearest first; positions are those in `plan.Tier`.
        io: reads and writes objects of `tiers`.
        metrics, log: where failures are counted and told.
        rank: this rank's number in reports.
        read_threads, write_threads: per tier.
        queue_bytes: write-behind data waiting at most; beyond that a spill is skipped and counted.
        open_copier: device of engine memory → what moves bytes in and out of it; called once for each.
    """

    def __init__(
        self,
        spec: KVSpec,
        chunk_tokens: int,
        arenas: Sequence[Arena],
        tiers: Sequence[Tier],
        *,
        io: ObjectCodec,
        metrics: Metrics,
        log: Throttle,
        rank: int = 0,
        read_threads: int,
        write_threads: int,
        queue_bytes: int,
        open_copier: Callable[[torch.device], EngineCopier] = open_copier,
    ) -> None:
        self._spec = spec
        self._chunk_tokens = chunk_tokens
        self._arenas = arenas
        self._tiers = tiers
        self._io = io
        self._metrics = metrics
        metrics.kernel_fallbacks(lambda: float(len(fallbacks())))
        self._log = log
        self._queue_bytes = queue_bytes
        self._open_copier = open_copier
        self._engine_copiers: dict[torch.device, EngineCopier] = {}
        self.tracker = JobTracker(rank)
        self._meters = [Meter() for _ in tiers]
        self._used = [0] * len(tiers)
        self._owed = [0] * len(tiers)  # bytes waiting to be written
        self._measure_at = [math.inf] * len(tiers)
        self._readers = [Workers(f"lmcache-{t.name}-read", read_threads) for t in tiers]
        self._writers = [Workers(f"lmcache-{t.name}-write", write_threads) for t in tiers]
        self._stored = Workers("lmcache-stored", 1)  # apart, so that a load is not told late because of stores
        self._loaded = Workers("lmcache-loaded", 1)
        self._lock = Lock()
        self._write_bytes = 0
        self._native: dict[int, ObjectLayout] = {}

    # ---------------------------------------------------------------- plans in, reports out

    def point(self, kv: BoundKV) -> object:
        """This point of the engine's stream, for `execute(after=…)`."""
        return self._engine_copier(kv).now()

    def execute(self, plan: Plan, views: Mapping[int, EngineView] | None = None, after: object = None) -> None:
        """Start every job of `plan`. `views[job id]` is needed by jobs that copy from or to the engine.

        Loads begin once the engine's stream has passed `after` (default: where it is now); their pages are free from there.

        On return the sources of its stores may be overwritten by whatever the engine enqueues later, and loads from ready
        slots of host memory are complete (on a device, when they are reported). A job that was seen before is ignored, so a
        plan may be delivered twice.
        """
        for active in self.tracker.begin(plan, views or {}):
            self._guard(active, range(len(active.job.ops)), partial(self._begin, active, after))

    def _begin(self, active: ActiveJob, after: object) -> None:
        if active.view is not None:
            active.after = self.point(active.view.kv) if after is None else after
        self._start(active)

    def queue(self) -> tuple[int, int]:
        """Tier calls waiting for a thread, and bytes waiting to be written."""
        return sum(w.queued for w in (*self._readers, *self._writers)), self._write_bytes

    def facts(self) -> list[TierFacts]:
        """What is known of each tier's room and speed, without asking it."""
        with self._lock:
            used = [a + b for a, b in zip(self._used, self._owed, strict=True)]
        return [TierFacts(n, *meter.read()) for n, meter in zip(used, self._meters, strict=True)]

    def measure(self, tier: int) -> None:
        """Refreshes the estimate of a tier's used bytes (blocking); later writes are added to it."""
        self._measure_at[tier] = time.monotonic() + _MEASURE_S
        used = self._tiers[tier].used_bytes()
        with self._lock:
            self._used[tier] = used

    def close(self, timeout: float = 5.0) -> bool:
        """Finish queued work and end the threads; False if some tier call still hangs."""
        until = time.monotonic() + timeout
        pools = (*self._readers, *self._writers, self._stored, self._loaded)
        ended = [workers.close(max(0.0, until - time.monotonic())) for workers in pools]
        return all(ended)

    def _finish(
        self, active: ActiveJob, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = ""
    ) -> None:
        self.tracker.finish(active, indices, status, nbytes, detail)
        if indices and status in _ALARMS:
            self._metrics.failed(active.job.kind, status.name.lower(), len(indices))
            self._log.warning(f"{active.job.kind}-{status.name.lower()}", objects=len(indices), detail=detail)

    # ---------------------------------------------------------------- the start of a job

    def _start(self, active: ActiveJob) -> None:
        """Sort the ops of a job by kind of hop and set each kind going."""
        stores: dict[int, list[int]] = {}
        ready: dict[int, list[int]] = {}
        promotions: list[int] = []
        direct: list[int] = []
        write_backs: list[int] = []
        tier_ops: dict[tuple[int, bool], list[int]] = {}
        followers: dict[SlotKey, list[int]] = {}
        unsupported: list[int] = []
        for i, op in enumerate(active.job.ops):
            if isinstance(op, (Probe, Delete)):
                tier_ops.setdefault((op.tier, isinstance(op, Probe)), []).append(i)
                continue
            group = op.name.group
            if isinstance(op.src, Engine) and isinstance(op.dst, ArenaSlot):
                stores.setdefault(group, []).append(i)
            elif isinstance(op.src, ArenaSlot) and isinstance(op.dst, Engine):
                key = (group, op.src.index)
                if key in followers:
                    followers[key].append(i)
                else:
                    ready.setdefault(group, []).append(i)
            elif isinstance(op.src, TierPlace) and isinstance(op.dst, ArenaSlot):
                promotions.append(i)
                followers[group, op.dst.index] = []
            elif isinstance(op.src, TierPlace) and isinstance(op.dst, Engine):
                direct.append(i)
            elif isinstance(op.src, ArenaSlot) and isinstance(op.dst, TierPlace):
                write_backs.append(i)
            else:
                unsupported.append(i)
        self._finish(active, unsupported, Status.FAILED, detail="this transfer has no such hop")

        for group, indices in stores.items():
            self._guard(active, indices, partial(self._store, active, group, indices))
        for i in write_backs:
            self._queue_write_back(active, i)
        for (tier, probe), indices in tier_ops.items():
            call = self._probe if probe else self._delete
            self._submit(self._readers[tier], active, indices, partial(call, active, tier, indices))

        for i in promotions:
            op = active.copy(i)
            assert isinstance(op.dst, ArenaSlot)
            after = followers[op.name.group, op.dst.index]
            self._submit(self._reader(op), active, [i, *after], partial(self._promote_and_scatter, active, i, after))
        for i in direct:
            self._submit(self._reader(active.copy(i)), active, [i], partial(self._load_from_tier, active, i))
        for group, indices in ready.items():
            self._guard(active, indices, partial(self._scatter, active, group, indices))

    def _engine_copier(self, kv: BoundKV) -> EngineCopier:
        device = kv.device
        with self._lock:
            found = self._engine_copiers.get(device)
            if found is None:
                found = self._engine_copiers[device] = self._open_copier(device)
            return found

    def _reader(self, op: Copy) -> Workers:
        assert isinstance(op.src, TierPlace)
        return self._readers[op.src.index]

    def _submit(self, workers: Workers, active: ActiveJob, indices: Sequence[int], task: Callable[[], object]) -> bool:
        queued = workers.submit(partial(self._guard, active, indices, task))
        if not queued:
            self._finish(active, indices, Status.CANCELLED, detail="the cache is closed, or no thread can be started")
        return queued

    def _guard(self, active: ActiveJob, indices: Sequence[int], task: Callable[[], object]) -> None:
        """The one place where whatever goes wrong in the data plane turns into a status instead of an exception."""
        try:
            task()
        except Exception as error:
            left = [i for i in indices if i in active.unfinished]
            self._finish(active, left, Status.FAILED, detail=f"{type(error).__name__}: {error}")

    # ---------------------------------------------------------------- hops

    def _store(self, active: ActiveJob, group: int, indices: Sequence[int]) -> None:
        """Engine → slots, all objects of a group in one gather. On return the engine may overwrite the source."""
        view = _view_of(active)
        layout = view.kv.native(group, self._chunk_tokens)
        arena = self._arenas[group]
        live, outs, starts = [], [], []
        for i in indices:
            op = active.copy(i)
            assert isinstance(op.dst, ArenaSlot)
            try:
                self.tracker.claim(group, op.dst.index)
                outs.append(arena.view(op.dst.index))
            except MemoryError as error:
                self._finish(active, [i], Status.FULL, detail=str(error))
                continue
            live.append(i)
            starts.append(op.start)
        if not live:
            return
        self._native[group] = layout
        slots = _slots_at(view.slots[group], starts, self._chunk_tokens)
        try:
            arrival = self._engine_copier(view.kv).store(view.kv, group, slots, outs, layout)
        except StagingFullError as full:
            self._metrics.skipped_store("staging", len(live))
            self._finish(active, live, Status.SKIPPED, detail=str(full))
            return

        def stored() -> None:
            self.tracker.tag(active, live, layout)
            nbytes = layout.nbytes * len(live)
            self._metrics.moved("engine", "dram", nbytes)
            self._finish(active, live, Status.OK, nbytes)

        self._when_there(self._stored, active, live, [] if arrival is None else [arrival], stored)

    def _scatter(self, active: ActiveJob, group: int, indices: Sequence[int]) -> None:
        """Arena slots → engine, all objects of a group in one scatter for each layout that they have."""
        view = _view_of(active)
        ops, arena = active.job.ops, self._arenas[group]
        batches: dict[int, tuple[ObjectLayout, list[int]]] = {}
        stale: list[int] = []
        for i, held in zip(indices, self.tracker.layouts(active, indices), strict=True):
            if held is None:
                stale.append(i)
            else:
                batches.setdefault(id(held), (held, []))[1].append(i)
        self._finish(active, stale, Status.SKIPPED, detail="the slot does not hold this object")
        if not self.tracker.begin_engine_write(active):
            self._finish(active, [i for i in indices if i not in stale], Status.CANCELLED)
            return
        arrivals: list[Completion] = []
        end = partial(self.tracker.end_engine_write, active)
        try:
            for layout, batch in batches.values():
                copies = [op for i in batch if isinstance(op := ops[i], Copy)]
                srcs = arena.views([op.src.index for op in copies if isinstance(op.src, ArenaSlot)])
                slots = _slots_at(view.slots[group], [op.start for op in copies], self._chunk_tokens)
                arrival = self._engine_copier(view.kv).load(srcs, layout, view.kv, group, slots, active.after)
                arrivals += [] if arrival is None else [arrival]
        except BaseException:
            _settle(arrivals, end)
            raise

        def loaded() -> None:
            for layout, batch in batches.values():
                self._metrics.moved("dram", "engine", layout.nbytes * len(batch))
                self._finish(active, batch, Status.OK, layout.nbytes * len(batch))

        self._when_there(
            self._loaded, active, [i for _, batch in batches.values() for i in batch], arrivals, loaded, end
        )

    def _when_there(
        self,
        waiters: Workers,
        active: ActiveJob,
        indices: Sequence[int],
        arrivals: Sequence[Completion],
        then: Callable[[], None],
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """`end()`, and `then()` if all went well, when everything has arrived: now, or on a thread of `waiters`."""

        def settle() -> None:
            _settle(arrivals, end)
            then()

        if not arrivals:
            settle()
        elif not waiters.submit(partial(self._guard, active, indices, settle)):
            self._guard(active, indices, settle)  # closing: nothing is left running

    def _promote_and_scatter(self, active: ActiveJob, index: int, after: Sequence[int]) -> None:
        if self._promote(active, index):
            if after:
                self._scatter(active, active.job.ops[after[0]].name.group, after)
        else:
            self._finish(active, after, Status.SKIPPED)

    def _promote(self, active: ActiveJob, index: int) -> bool:
        """Tier → slot: read, verify, and tag the slot if all is well."""
        op = active.copy(index)
        assert isinstance(op.src, TierPlace)
        assert isinstance(op.dst, ArenaSlot)
        if active.late:
            self._finish(active, [index], Status.CANCELLED)
            return False
        group = op.name.group
        try:
            self.tracker.claim(group, op.dst.index)
            out = self._arenas[group].view(op.dst.index)
        except MemoryError as error:
            self._finish(active, [index], Status.FULL, detail=str(error))
            return False
        tier = self._tiers[op.src.index]
        loaded = self._load(op.src.index, op.name, out, self._native.get(group), active.deadline)
        if loaded.layout is None:
            self._lost(active, index, tier, loaded.result)
            return False
        self.tracker.tag(active, [index], loaded.layout)
        self._metrics.moved(tier.name, "dram", loaded.result.nbytes)
        self._finish(active, [index], Status.OK, loaded.result.nbytes)
        return True

    def _load_from_tier(self, active: ActiveJob, index: int) -> None:
        """Tier → engine by way of this thread's bounce buffer, when the arena has no slot to spare."""
        op = active.copy(index)
        assert isinstance(op.src, TierPlace)
        view = _view_of(active)
        group = op.name.group
        if active.late:
            self._finish(active, [index], Status.CANCELLED)
            return
        tier = self._tiers[op.src.index]
        out = self._io.bounce(group)
        loaded = self._load(op.src.index, op.name, out, None, active.deadline)
        if loaded.layout is None:
            self._lost(active, index, tier, loaded.result)
            return
        if not self.tracker.begin_engine_write(active):
            self._finish(active, [index], Status.CANCELLED)
            return
        arrivals: list[Completion] = []
        try:
            slots = _slots_at(view.slots[group], [op.start], self._chunk_tokens)
            arrival = self._engine_copier(view.kv).load([out], loaded.layout, view.kv, group, slots, after=active.after)
            arrivals += [] if arrival is None else [arrival]
        finally:
            _settle(arrivals, partial(self.tracker.end_engine_write, active))
        self._metrics.moved(tier.name, "engine", loaded.result.nbytes)
        self._finish(active, [index], Status.OK, loaded.result.nbytes)

    def _load(
        self, tier: int, name: Name, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        with self._meters[tier].load() as count:
            loaded = self._io.load(self._tiers[tier], self._object_id(name), out, want, deadline)
            if loaded.layout is not None:
                count(loaded.result.nbytes)
        if time.monotonic() >= self._measure_at[tier]:
            self.measure(tier)
        return loaded

    def _lost(self, active: ActiveJob, index: int, tier: Tier, result: Result) -> None:
        if result.status is Status.CORRUPT:
            self._metrics.corrupted(tier.name)
        self._finish(active, [index], result.status, detail=f"{tier.name}: {result.detail}")

    def _queue_write_back(self, active: ActiveJob, index: int) -> None:
        """ArenaSlot → tier, write-behind. What does not fit into the queue is dropped: a slow disk never slows the engine."""
        op = active.copy(index)
        assert isinstance(op.dst, TierPlace)
        nbytes = self._arenas[op.name.group].slot_bytes
        with self._lock:
            fits = self._write_bytes + nbytes <= max(self._queue_bytes, nbytes)
            if fits:
                self._write_bytes += nbytes
                self._owed[op.dst.index] += nbytes
        if not fits:
            self._metrics.skipped_store("queue")
            self._finish(active, [index], Status.SKIPPED, detail="write-behind queue is full")
            return
        self._submit(self._writers[op.dst.index], active, [index], partial(self._write_back, active, index, nbytes))

    def _write_back(self, active: ActiveJob, index: int, queued: int) -> None:
        op = active.copy(index)
        assert isinstance(op.src, ArenaSlot)
        assert isinstance(op.dst, TierPlace)
        tier = self._tiers[op.dst.index]
        try:
            [held] = self.tracker.layouts(active, [index])
            if held is None:
                self._finish(active, [index], Status.SKIPPED, detail="the slot does not hold this object")
                return
            payload = self._arenas[op.name.group].view(op.src.index)
            result = self._io.save(tier, self._object_id(op.name), payload, held)
            if result.status is Status.OK:
                self._metrics.moved("dram", tier.name, result.nbytes)
                self._wrote(op.dst.index, result.nbytes)
            else:
                self._metrics.skipped_store(result.status.name.lower())
            self._finish(active, [index], result.status, result.nbytes, f"{tier.name}: {result.detail}")
        finally:
            with self._lock:
                self._write_bytes -= queued
                self._owed[op.dst.index] -= queued

    def _wrote(self, tier: int, nbytes: int) -> None:
        with self._lock:
            self._used[tier] += nbytes
        if time.monotonic() >= self._measure_at[tier]:  # others write too, and somebody evicts
            self.measure(tier)

    def _probe(self, active: ActiveJob, tier: int, indices: Sequence[int]) -> None:
        ids = [self._object_id(active.job.ops[i].name) for i in indices]
        for i, result in zip(indices, self._io.contains(self._tiers[tier], ids, active.deadline), strict=True):
            self._finish(active, [i], result.status, detail=result.detail)

    def _delete(self, active: ActiveJob, tier: int, indices: Sequence[int]) -> None:
        ids = [self._object_id(active.job.ops[i].name) for i in indices]
        for i, result in zip(indices, self._tiers[tier].delete(ids, deadline=active.deadline), strict=True):
            self._finish(active, [i], result.status, detail=result.detail)

    def _object_id(self, name: Name) -> ObjectId:
        return ObjectId.of(name, self._spec.rects[name.group])


def _settle(arrivals: Sequence[Completion], end: Callable[[], None]) -> None:
    """Wait for all, whatever happens to one of them, then `end`."""
    with ExitStack() as last:
        last.callback(end)
        for arrival in arrivals:
            last.callback(arrival)


def _view_of(active: ActiveJob) -> EngineView:
    if active.view is None:
        raise ValueError(f"job {active.job.id} ({active.job.kind}) copies engine memory, but no view of it was passed")
    return active.view


def _slots_at(slots: torch.Tensor, starts: Sequence[int], tokens: int) -> torch.Tensor:
    """The slots of the objects that start at `starts` (multiples of `tokens`), one after another."""
    first, count = starts[0], len(starts)
    if starts[-1] == first + (count - 1) * tokens and all(b - a == tokens for a, b in pairwise(starts)):
        return slots[first : first + count * tokens]
    return torch.cat([slots[start : start + tokens] for start in starts])
