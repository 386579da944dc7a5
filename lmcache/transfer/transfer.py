"""The data plane of one rank: executes plans, copies bytes, makes no decisions.

`execute` starts a plan and never waits for a tier: copies between engine memory and arena slots are made at once, in large
batches; tier calls go to worker threads. Results are in `Transfer.tracker`: `report` returns what the index has not
acknowledged yet, `fence` waits until jobs no longer touch engine memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from threading import Lock

import torch

from lmcache.config import Checksums
from lmcache.format.codec import ObjectCodec, checksum
from lmcache.layout import BoundKV, ObjectLayout
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import ArenaSlot, Copy, Delete, Engine, Plan, Probe, Status
from lmcache.plan import Tier as TierPlace
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier
from lmcache.transfer.arena import Arena
from lmcache.transfer.engine_copy import Completion, EngineCopier, StagingFullError, open_copier
from lmcache.transfer.jobs import ActiveJob, EngineView, JobRunner, JobTracker, SlotKey, Tag
from lmcache.transfer.tier_copy import TierCopier
from lmcache.transfer.workers import Workers
from lmcache_kernels import fallbacks

__all__ = ["EngineView", "Transfer"]


class Transfer:
    """Executes plans on one rank. Copies between engine memory and arena slots itself, and through `TierCopier` to tiers.

    Args:
        spec: spec of this rank's KV.
        chunk_tokens: tokens per object.
        arenas: one per group, host memory.
        tiers: nearest first; positions are those in `plan.Tier`.
        io: reads and writes objects of `tiers`.
        metrics, log: where failures are counted and logged.
        rank: this rank's number in reports.
        read_threads, write_threads: per tier.
        queue_bytes: maximum bytes waiting to be written back; beyond that a write-back is skipped and counted.
        checksums: see `Config.memory_checksums`.
        open_copier: device of engine memory → its copier; called once per device.

    Attributes:
        tracker: the jobs' states and reports.
        tier_copier: copies between arena slots and tiers.
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
        checksums: Checksums = "off",
        open_copier: Callable[[torch.device], EngineCopier] = open_copier,
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._arenas = arenas
        self._metrics = metrics
        metrics.kernel_fallbacks(lambda: float(len(fallbacks())))
        self._checksums = checksums
        self._open_copier = open_copier
        self._engine_copiers: dict[torch.device, EngineCopier] = {}
        self._lock = Lock()
        self.tracker = JobTracker(rank)
        self._runner = JobRunner(self.tracker, metrics, log)
        self.tier_copier = TierCopier(
            spec,
            arenas,
            tiers,
            io,
            self._runner,
            metrics,
            read_threads=read_threads,
            write_threads=write_threads,
            queue_bytes=queue_bytes,
            checksums=checksums == "load" or (checksums == "write" and len(tiers) > 1),
        )
        # Two pools: reports of loads must not wait for stores.
        self._store_waiters = Workers("lmcache-stored", 1)
        self._load_waiters = Workers("lmcache-loaded", 1)

    # ---------------------------------------------------------------- plans

    def point(self, kv: BoundKV) -> object:
        """Returns the current point of the engine's stream, for `execute(after=…)`."""
        return self._engine_copier(kv).now()

    def execute(self, plan: Plan, views: Mapping[int, EngineView] | None = None, after: object = None) -> None:
        """Starts every job of `plan`. A job that was seen before is ignored, so a plan may be delivered twice.

        On return, the sources of its stores may be overwritten by whatever the engine enqueues later, and loads from ready
        slots of host memory are complete (on a device, when they are reported).

        Args:
            plan: what to do.
            views: job id → engine memory, for each job that copies from or to the engine.
            after: a `point` of the engine's stream after which the pages of the loads are free; default: now.
        """
        for active in self.tracker.begin(plan, views or {}):
            try:
                self._begin(active, after)
            except Exception as error:
                self._runner.fail(active, range(len(active.job.ops)), error)

    def _begin(self, active: ActiveJob, after: object) -> None:
        if active.view is not None:
            active.after = self.point(active.view.kv) if after is None else after
        self._start(active)

    def close(self, timeout: float = 5.0) -> bool:
        """Finishes queued work and ends the threads; False if some tier call still hangs after `timeout` seconds."""
        until = time.monotonic() + timeout
        pools = (*self.tier_copier.workers, self._store_waiters, self._load_waiters)
        ended = [workers.close(max(0.0, until - time.monotonic())) for workers in pools]
        return all(ended)

    # ---------------------------------------------------------------- the start of a job

    def _start(self, active: ActiveJob) -> None:
        """Sorts the ops of a job by hop and starts each kind."""
        stores: dict[int, list[int]] = {}  # group → ops
        ready: dict[int, list[int]] = {}  # group → loads from slots that no op of this job fills
        promotions: list[tuple[int, int]] = []  # (tier, op)
        followers: dict[SlotKey, list[int]] = {}  # slot of a promotion → loads from it
        unbuffered: list[tuple[int, int]] = []  # (tier, op)
        write_backs: list[int] = []
        probes: dict[int, list[int]] = {}  # tier → ops
        deletes: dict[int, list[int]] = {}
        unsupported: list[int] = []
        for i, op in enumerate(active.job.ops):
            if isinstance(op, Probe):
                probes.setdefault(op.tier, []).append(i)
                continue
            if isinstance(op, Delete):
                deletes.setdefault(op.tier, []).append(i)
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
                promotions.append((op.src.index, i))
                followers[group, op.dst.index] = []
            elif isinstance(op.src, TierPlace) and isinstance(op.dst, Engine):
                unbuffered.append((op.src.index, i))
            elif isinstance(op.src, ArenaSlot) and isinstance(op.dst, TierPlace):
                write_backs.append(i)
            else:
                unsupported.append(i)
        if unsupported:
            self._runner.finish(active, unsupported, Status.FAILED, detail="this transfer has no such hop")

        self._each(self._store, active, stores)
        for i in write_backs:
            self.tier_copier.queue_write_back(active, i)
        for tier, indices in probes.items():
            self.tier_copier.submit_probe(tier, active, indices)
        for tier, indices in deletes.items():
            self.tier_copier.submit_delete(tier, active, indices)
        for tier, i in promotions:
            op = active.copy(i)
            assert isinstance(op.dst, ArenaSlot)
            loads = followers[op.name.group, op.dst.index]
            task = partial(self._promote_and_scatter, active, i, loads)
            self.tier_copier.submit_read(tier, active, [i, *loads], task)
        for tier, i in unbuffered:
            self.tier_copier.submit_read(tier, active, [i], partial(self._load_unbuffered, active, i))
        self._each(self._scatter, active, ready)  # while tiers read

    def _each(
        self,
        hop: Callable[[ActiveJob, int, Sequence[int]], None],
        active: ActiveJob,
        groups: Mapping[int, Sequence[int]],
    ) -> None:
        """Runs a hop for the ops of each group; one that raises fails only its own."""
        for group, indices in groups.items():
            try:
                hop(active, group, indices)
            except Exception as error:
                self._runner.fail(active, indices, error)

    def _engine_copier(self, kv: BoundKV) -> EngineCopier:
        device = kv.device
        with self._lock:
            found = self._engine_copiers.get(device)
            if found is None:
                found = self._engine_copiers[device] = self._open_copier(device)
            return found

    # ---------------------------------------------------------------- hops

    def _store(self, active: ActiveJob, group: int, indices: Sequence[int]) -> None:
        """Engine → arena slots, all objects of a group in one gather. On return the engine may overwrite the source."""
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
                self._runner.finish(active, [i], Status.FULL, detail=str(error))
                continue
            live.append(i)
            starts.append(op.start)
        if not live:
            return
        self.tier_copier.layouts[group] = layout
        slots = _slots_at(view.slots[group], starts, self._chunk_tokens)
        try:
            completion = self._engine_copier(view.kv).store(view.kv, group, slots, outs, layout)
        except StagingFullError as full:
            self._metrics.skipped_store("staging", len(live))
            self._runner.finish(active, live, Status.SKIPPED, detail=str(full))
            return

        def stored() -> None:
            made = [None if self._checksums == "off" else checksum(out) for out in outs]
            self.tracker.tag(active, live, layout, made)
            nbytes = layout.nbytes * len(live)
            self._metrics.moved("engine", "dram", nbytes)
            self._runner.finish(active, live, Status.OK, nbytes)

        completions = [] if completion is None else [completion]
        self._when_complete(self._store_waiters, active, live, completions, stored)

    def _scatter(self, active: ActiveJob, group: int, indices: Sequence[int]) -> None:
        """Arena slots → engine, all objects of a group in one scatter per layout."""
        view = _view_of(active)
        ops, arena = active.job.ops, self._arenas[group]
        batches: dict[int, tuple[ObjectLayout, list[int]]] = {}
        stale: list[int] = []
        changed: list[int] = []
        for i, tag in zip(indices, self.tracker.tags(active, indices), strict=True):
            if tag is None:
                stale.append(i)
            elif self._checksums == "load" and self._changed(group, active.copy(i), tag):
                changed.append(i)
            else:
                batches.setdefault(id(tag.layout), (tag.layout, []))[1].append(i)
        if stale:
            self._runner.finish(active, stale, Status.SKIPPED, detail="the slot does not hold this object")
        if changed:
            self._metrics.corrupted("dram", len(changed))
            self._runner.finish(active, changed, Status.CORRUPT, detail="its bytes have changed in host memory")
        live = [i for _, batch in batches.values() for i in batch]
        if not live:
            return
        if not self.tracker.begin_engine_write(active):
            self._runner.finish(active, live, Status.CANCELLED)
            return
        completions: list[Completion] = []
        end = partial(self.tracker.end_engine_write, active)
        try:
            for layout, batch in batches.values():
                copies = [op for i in batch if isinstance(op := ops[i], Copy)]
                srcs = arena.views([op.src.index for op in copies if isinstance(op.src, ArenaSlot)])
                slots = _slots_at(view.slots[group], [op.start for op in copies], self._chunk_tokens)
                completion = self._engine_copier(view.kv).load(srcs, layout, view.kv, group, slots, active.after)
                completions += [] if completion is None else [completion]
        except BaseException:
            _wait_for_all(completions, end)
            raise

        def loaded() -> None:
            for layout, batch in batches.values():
                self._metrics.moved("dram", "engine", layout.nbytes * len(batch))
                self._runner.finish(active, batch, Status.OK, layout.nbytes * len(batch))

        self._when_complete(self._load_waiters, active, live, completions, loaded, end)

    def _changed(self, group: int, copy: Copy, tag: Tag) -> bool:
        """Whether the bytes in the source slot of `copy` differ from those that were put there."""
        assert isinstance(copy.src, ArenaSlot)
        return tag.checksum is not None and checksum(self._arenas[group].view(copy.src.index)) != tag.checksum

    def _when_complete(
        self,
        waiters: Workers,
        active: ActiveJob,
        indices: Sequence[int],
        completions: Sequence[Completion],
        then: Callable[[], None],
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits for `completions`, then calls `end`, and `then` if none failed: now if there are none, else on `waiters`."""

        def wait() -> None:
            _wait_for_all(completions, end)
            then()

        if not completions:
            wait()
        elif not waiters.submit(partial(self._runner.guard, active, indices, wait)):
            self._runner.guard(active, indices, wait)  # closing: nothing may be left running

    def _promote_and_scatter(self, active: ActiveJob, index: int, loads: Sequence[int]) -> None:
        """Tier → arena slot → engine: promotion `index`, then the loads from its slot."""
        if not self.tier_copier.promote(active, index):
            self._runner.finish(active, loads, Status.SKIPPED)
        elif loads:
            self._scatter(active, active.copy(index).name.group, loads)

    def _load_unbuffered(self, active: ActiveJob, index: int) -> None:
        """Tier → engine through a bounce buffer, when no arena slot is free."""
        view = _view_of(active)
        found = self.tier_copier.read_unbuffered(active, index)
        if found is None:
            return
        out, layout, nbytes = found
        if not self.tracker.begin_engine_write(active):
            self._runner.finish(active, [index], Status.CANCELLED)
            return
        op = active.copy(index)
        group = op.name.group
        completions: list[Completion] = []
        try:
            slots = _slots_at(view.slots[group], [op.start], self._chunk_tokens)
            completion = self._engine_copier(view.kv).load([out], layout, view.kv, group, slots, after=active.after)
            completions += [] if completion is None else [completion]
        finally:
            _wait_for_all(completions, partial(self.tracker.end_engine_write, active))
        self._metrics.moved(self.tier_copier.source(active, index).name, "engine", nbytes)
        self._runner.finish(active, [index], Status.OK, nbytes)


def _wait_for_all(completions: Sequence[Completion], end: Callable[[], None]) -> None:
    """Waits for all, even if some fail, then calls `end`."""
    with ExitStack() as stack:
        stack.callback(end)
        for completion in completions:
            stack.callback(completion)


def _view_of(active: ActiveJob) -> EngineView:
    if active.view is None:
        raise ValueError(f"job {active.job.id} ({active.job.kind}) copies engine memory, but no view of it was passed")
    return active.view


def _slots_at(slots: torch.Tensor, starts: Sequence[int], tokens: int) -> torch.Tensor:
    """Returns the slots of the objects that start at `starts`, concatenated; `tokens` slots each."""
    first, count = starts[0], len(starts)
    if starts[-1] == first + (count - 1) * tokens and all(b - a == tokens for a, b in pairwise(starts)):
        return slots[first : first + count * tokens]
    return torch.cat([slots[start : start + tokens] for start in starts])
