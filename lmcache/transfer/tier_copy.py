"""Copies objects between arena slots and tiers, on threads of each tier, and measures the tiers' fill level and throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

import torch

from lmcache.format.codec import Loaded, ObjectCodec, checksum
from lmcache.keys import Name, ObjectId
from lmcache.layout import ObjectLayout
from lmcache.observe.metrics import Metrics
from lmcache.plan import ArenaSlot, Status, TierFacts
from lmcache.plan import Tier as TierPlace
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier
from lmcache.transfer.arena import Arena
from lmcache.transfer.jobs import ActiveJob, JobRunner
from lmcache.transfer.tier_stats import Meter
from lmcache.transfer.workers import Workers

_MEASURE_S = 0.25
"""Seconds between two measurements of a tier's used bytes, once `measure` was called for it."""


class TierCopier:
    """The tier side of a transfer; touches no engine memory.

    Args:
        spec: spec of this rank's KV.
        arenas: one per group.
        tiers: nearest first; positions are those in `plan.Tier`.
        codec: reads and writes objects of `tiers`.
        runner: runs and finishes the ops.
        metrics: where moved bytes and lost objects are counted.
        read_threads, write_threads: per tier.
        queue_bytes: maximum bytes waiting to be written back; beyond that a write-back is skipped and counted.
        checksums: make a checksum of what is loaded into an arena slot.

    Attributes:
        layouts: group → layout to which promotions translate objects; a group without one keeps the stored layout.
        workers: all thread pools.
    """

    def __init__(
        self,
        spec: KVSpec,
        arenas: Sequence[Arena],
        tiers: Sequence[Tier],
        codec: ObjectCodec,
        runner: JobRunner,
        metrics: Metrics,
        *,
        read_threads: int,
        write_threads: int,
        queue_bytes: int,
        checksums: bool = False,
    ) -> None:
        self._spec = spec
        self._arenas = arenas
        self._tiers = tiers
        self._codec = codec
        self._runner = runner
        self._tracker = runner.tracker
        self._metrics = metrics
        self._queue_bytes = queue_bytes
        self._checksums = checksums
        self.layouts: dict[int, ObjectLayout] = {}
        self._readers = [Workers(f"lmcache-{t.name}-read", read_threads) for t in tiers]
        self._writers = [Workers(f"lmcache-{t.name}-write", write_threads) for t in tiers]
        self._meters = [Meter() for _ in tiers]
        self._lock = Lock()
        self._used = [0] * len(tiers)  # bytes, as of the last measurement plus later writes
        self._queued = [0] * len(tiers)  # bytes waiting to be written
        self.completed = 0  # objects written, found present or deleted
        self._measure_at = [math.inf] * len(tiers)

    @property
    def workers(self) -> tuple[Workers, ...]:
        """All thread pools, readers first."""
        return (*self._readers, *self._writers)

    # ---------------------------------------------------------------- measurements

    def queue(self) -> tuple[int, int]:
        """Returns the number of tier calls waiting for a thread, and the bytes waiting to be written."""
        with self._lock:
            nbytes = sum(self._queued)
        return sum(workers.queued for workers in self.workers), nbytes

    def facts(self) -> list[TierFacts]:
        """Returns fill level and throughput of each tier, without calling it."""
        with self._lock:
            used = [a + b for a, b in zip(self._used, self._queued, strict=True)]
        return [TierFacts(n, *meter.read()) for n, meter in zip(used, self._meters, strict=True)]

    def measure(self, tier: int) -> None:
        """Refreshes the estimate of a tier's used bytes (blocking); later writes are added to it."""
        self._measure_at[tier] = time.monotonic() + _MEASURE_S
        used = self._tiers[tier].used_bytes()
        with self._lock:
            self._used[tier] = used

    def _measure_if_due(self, tier: int) -> None:
        """Other processes write too, and tiers evict."""
        if time.monotonic() >= self._measure_at[tier]:
            self.measure_safely(tier)

    def measure_safely(self, tier: int) -> None:
        """`measure`; of a tier that cannot tell its used bytes, the last estimate stays."""
        try:
            self.measure(tier)
        except Exception:
            self._metrics.failed("measure", self._tiers[tier].name)

    # ---------------------------------------------------------------- tier → memory

    def submit_read(self, tier: int, active: ActiveJob, indices: Sequence[int], task: Callable[[], object]) -> None:
        """Runs `task`, which executes ops `indices`, on a thread that reads from `tier`."""
        self._runner.submit(self._readers[tier], active, indices, task)

    def promote(self, active: ActiveJob, index: int) -> bool:
        """Tier → arena slot: reads, verifies, and tags the slot. Returns whether it succeeded; the op is finished either way."""
        op = active.copy(index)
        assert isinstance(op.dst, ArenaSlot)
        if active.late:
            self._runner.finish(active, [index], Status.CANCELLED)
            return False
        group = op.name.group
        try:
            self._tracker.claim(group, op.dst.index)
            out = self._arenas[group].view(op.dst.index)
        except MemoryError as error:
            self._runner.finish(active, [index], Status.FULL, detail=str(error))
            return False
        loaded = self._load(active, index, out, self.layouts.get(group))
        if loaded.layout is None:
            return False
        self._tracker.tag(active, [index], loaded.layout, [checksum(out) if self._checksums else None])
        self._metrics.moved(self.source(active, index).name, "dram", loaded.result.nbytes)
        self._runner.finish(active, [index], Status.OK, loaded.result.nbytes)
        return True

    def read_unbuffered(self, active: ActiveJob, index: int) -> tuple[torch.Tensor, ObjectLayout, int] | None:
        """Tier → this thread's bounce buffer, which its next call overwrites; for objects without an arena slot.

        Returns:
            The object, its layout, and the bytes read; None if the read failed, or the job is late: then the op is finished.
        """
        if active.late:
            self._runner.finish(active, [index], Status.CANCELLED)
            return None
        out = self._codec.bounce(active.copy(index).name.group)
        loaded = self._load(active, index, out, None)
        return None if loaded.layout is None else (out, loaded.layout, loaded.result.nbytes)

    def _load(self, active: ActiveJob, index: int, out: torch.Tensor, want: ObjectLayout | None) -> Loaded:
        """Reads the object of op `index` into `out`; if that fails, finishes the op."""
        op = active.copy(index)
        assert isinstance(op.src, TierPlace)
        position = op.src.index
        tier = self._tiers[position]
        with self._meters[position].load() as count:
            loaded = self._codec.load(tier, self._object_id(op.name), out, want, active.deadline)
            if loaded.layout is not None:
                count(loaded.result.nbytes)
        self._measure_if_due(position)
        if loaded.layout is None:
            if loaded.result.status is Status.CORRUPT:
                self._metrics.corrupted(tier.name)
            self._runner.finish(active, [index], loaded.result.status, detail=f"{tier.name}: {loaded.result.detail}")
        return loaded

    def source(self, active: ActiveJob, index: int) -> Tier:
        """Returns the tier that op `index` reads."""
        op = active.copy(index)
        assert isinstance(op.src, TierPlace)
        return self._tiers[op.src.index]

    # ---------------------------------------------------------------- arena slot → tier

    def queue_write_back(self, active: ActiveJob, index: int) -> None:
        """Arena slot → tier, later. Skipped if the queue is full: a slow disk must not slow the engine."""
        op = active.copy(index)
        assert isinstance(op.dst, TierPlace)
        nbytes = self._arenas[op.name.group].slot_bytes
        with self._lock:
            fits = sum(self._queued) + nbytes <= max(self._queue_bytes, nbytes)
            if fits:
                self._queued[op.dst.index] += nbytes
        if not fits:
            self._metrics.skipped_store("queue")
            self._runner.finish(active, [index], Status.SKIPPED, detail="write-back queue is full")
            return
        task = partial(self._write_back, active, index, nbytes)
        if not self._runner.submit(self._writers[op.dst.index], active, [index], task):
            with self._lock:
                self._queued[op.dst.index] -= nbytes

    def _write_back(self, active: ActiveJob, index: int, queued: int) -> None:
        op = active.copy(index)
        assert isinstance(op.src, ArenaSlot)
        assert isinstance(op.dst, TierPlace)
        tier = self._tiers[op.dst.index]
        try:
            [tag] = self._tracker.tags(active, [index])
            if tag is None:
                self._runner.finish(active, [index], Status.SKIPPED, detail="the slot does not hold this object")
                return
            if tier.shared and self._holds(tier, self._object_id(op.name)):
                if (note := getattr(tier, "note_present", None)) is not None:
                    note(self._object_id(op.name))
                self.completed += 1
                self._runner.finish(active, [index], Status.PRESENT)
                return
            payload = self._arenas[op.name.group].view(op.src.index)
            result = self._codec.save(tier, self._object_id(op.name), payload, tag.layout, tag.checksum, tag.begun)
            if result.status is Status.CORRUPT:
                self._metrics.corrupted("dram")
            if result.status is Status.OK:
                self.completed += 1
                self._metrics.moved("dram", tier.name, result.nbytes)
                with self._lock:
                    self._used[op.dst.index] += result.nbytes
                self._measure_if_due(op.dst.index)
            else:
                self._metrics.skipped_store(result.status.name.lower())
            self._runner.finish(active, [index], result.status, result.nbytes, f"{tier.name}: {result.detail}")
        finally:
            with self._lock:
                self._queued[op.dst.index] -= queued

    def _holds(self, tier: Tier, id: ObjectId) -> bool:
        """Whether a tier holds an object already. Removes a damaged one, which the write would leave in place."""
        status = self._codec.check(tier, id)
        if status is Status.CORRUPT:
            if (note := getattr(tier, "note_damaged", None)) is not None:
                note(id)
            tier.delete([id])
        return status is Status.OK

    # ---------------------------------------------------------------- probe, delete

    def submit_probe(self, tier: int, active: ActiveJob, indices: Sequence[int]) -> None:
        """Checks in the background which objects a tier holds."""
        self.submit_read(tier, active, indices, partial(self._probe, active, tier, indices))

    def submit_delete(self, tier: int, active: ActiveJob, indices: Sequence[int]) -> None:
        """Removes objects from a tier in the background."""
        self.submit_read(tier, active, indices, partial(self._delete, active, tier, indices))

    def _probe(self, active: ActiveJob, tier: int, indices: Sequence[int]) -> None:
        ids = [self._object_id(active.job.ops[i].name) for i in indices]
        for i, result in zip(indices, self._codec.contains(self._tiers[tier], ids, active.deadline), strict=True):
            self._runner.finish(active, [i], result.status, detail=result.detail)

    def _delete(self, active: ActiveJob, tier: int, indices: Sequence[int]) -> None:
        ids = [self._object_id(active.job.ops[i].name) for i in indices]
        for i, result in zip(indices, self._tiers[tier].delete(ids, deadline=active.deadline), strict=True):
            self.completed += 1
            self._runner.finish(active, [i], result.status, detail=result.detail)

    def _object_id(self, name: Name) -> ObjectId:
        return ObjectId.of(name, self._spec.rects[name.group])
