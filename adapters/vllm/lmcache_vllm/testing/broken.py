"""vLLM connectors, each broken in one way. `lmcache_vllm.testing.mutants` runs the conformance suite on them.

They break the scheduler or the worker side of the connector; vLLM, its recomputation and everything below are unchanged. What
each failure means is in `lmcache_conformance.mutants.engine_failures`; here is how the connector gets it. Some connectors are
not mutants but inject faults (a load fails, a side raises) for the adapter's own tests, which check how vLLM recovers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lmcache.config import Config
from lmcache.control import Index
from lmcache.control.plane import Plane
from lmcache.format.codec import Loaded, ObjectCodec
from lmcache.keys import Chain, ObjectId, as_tokens
from lmcache.layout import ObjectLayout
from lmcache.plan import ArenaSlot, Copy, Job, JobReport
from lmcache.tiers.base import Tier
from lmcache.transfer.jobs import EngineView
from lmcache_vllm.messages import BlockView
from lmcache_vllm.requests import Tracked
from lmcache_vllm.scheduler import ConnectorScheduler
from lmcache_vllm.testing.session import Observed, ObservedConnector
from lmcache_vllm.worker import ConnectorWorker, LoadResults

SEPARATOR = "\0"


class Broken(ObservedConnector):
    """A connector whose scheduler side, worker side or settings are replaced."""

    scheduler: ClassVar[type[ConnectorScheduler]] = ConnectorScheduler
    worker: ClassVar[type[ConnectorWorker]] = ConnectorWorker
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = Config.load(json={**self._kv_transfer_config.kv_connector_extra_config, **self.settings})
        if self._scheduler is not None:
            self._scheduler = self.scheduler(kv_cache_config, config)
        if self._worker is not None:
            self._worker = self.worker(vllm_config, kv_cache_config, config)


# ---------------------------------------------------------------- loads that fail


class LosesSlots(ConnectorWorker):
    """Reuses the slot of object `lost` of a load before the load begins, so that the load fails; in the first `times` loads."""

    lost: ClassVar[int] = 0
    times = 1 << 30

    def start_load_kv(self) -> None:
        for job in loads_of(self)[: self.times]:
            self.times -= 1
            op = job.ops[self.lost % len(job.ops)]
            if isinstance(op, Copy) and isinstance(op.src, ArenaSlot) and self._rank is not None:
                self._rank.transfer.tracker.claim(op.name.group, op.src.index)
        super().start_load_kv()


def loads_of(worker: ConnectorWorker) -> list[Job]:
    """Returns the load jobs of the current step."""
    return [job for job in worker._step.plan.jobs if job.kind == "load"] if worker._step is not None else []


class LosesFirst(Broken):
    """The first object of every load is lost."""

    worker = LosesSlots


class LosesMiddle(Broken):
    """The third object of every load is lost."""

    class _Worker(LosesSlots):
        lost = 2

    worker = _Worker


class LosesOnce(Broken):
    """The third object of the first load is lost."""

    class _Worker(LosesSlots):
        lost = 2
        times = 1

    worker = _Worker


class IgnoresFailedLoads(Broken):
    """Reports every load as done, whatever its job report contains."""

    class _Worker(LosesSlots):
        lost = 2

        def _ended(self, found: LoadResults, load: BlockView, report: JobReport) -> None:
            found.requests.add(load.request)

    worker = _Worker


class ReportsTooLittleLost(Broken):
    """Reports only the last block of a failed load as lost."""

    class _Worker(LosesSlots):
        lost = 2

        def _mark_failed(self, found: LoadResults, view: BlockView) -> None:
            super()._mark_failed(found, view)
            found.blocks = {view.blocks[0][-(-view.tokens // self._sizes[0]) - 1]}

    worker = _Worker


class OffersAgain(Broken):
    """Removes a request from those whose load has failed before each offer; every load loses its first object."""

    class _Scheduler(ConnectorScheduler):
        def _offer(self, tracked: Tracked, local: int, *, asked: bool = True) -> int | None:
            if self._plane is not None and tracked.request.request_id in self._plane.state.failed:
                self._plane.state.failed.discard(tracked.request.request_id)
                tracked.spent = False
            return super()._offer(tracked, local, asked=asked)

    scheduler, worker = _Scheduler, LosesSlots


# ---------------------------------------------------------------- names


class _ReplacesSalts(ConnectorScheduler):
    """Derives keys from another salt than the request's."""

    def replaced(self, salt: str) -> str:
        """Returns the salt that is used instead."""
        raise NotImplementedError

    def open(self, offers: Any) -> None:
        super().open(offers)
        assert self._plane is not None
        names = self._plane.names
        of = names.of
        names.of = lambda salt="", lora="", scope="": of(self.replaced(salt), lora, scope)  # type: ignore[method-assign]


class NamesByLength(Broken):
    """Derives the chain of digests from as many copies of one token."""

    class _Scheduler(ConnectorScheduler):
        def _named(self, tracked: Tracked) -> Chain:
            assert self._plane is not None
            if tracked.chain is None or len(tracked.chain.digests) < tracked.request.num_tokens // self._chunk:
                tracked.chain = self._plane.names.chain(
                    as_tokens([7] * tracked.request.num_tokens), tracked.salt, tracked.lora
                )
            return tracked.chain

    scheduler = _Scheduler


class NamesByProcess(Broken):
    """Appends the process id to the salt."""

    class _Scheduler(_ReplacesSalts):
        def replaced(self, salt: str) -> str:
            return f"{salt}{SEPARATOR}{os.getpid()}"

    scheduler = _Scheduler


class NamesByHashSeed(Broken):
    """Appends the hash of a string to the salt."""

    class _Scheduler(_ReplacesSalts):
        def replaced(self, salt: str) -> str:
            return f"{salt}{SEPARATOR}{hash('none')}"

    scheduler = _Scheduler


class KnowsNoTenants(Broken):
    """Passes an empty salt to the namespace."""

    class _Scheduler(_ReplacesSalts):
        def replaced(self, salt: str) -> str:
            return ""

    scheduler = _Scheduler


class TrustsTheName(Broken):
    """Uses a fixed `model_identity`."""

    settings: ClassVar[Mapping[str, Any]] = {"model_identity": "my-model"}


# ---------------------------------------------------------------- blocks


class TakesTheWrongEnd(Broken):
    """Stores the last blocks of a request in place of its first ones."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            if job.kind == "store":
                counts = [-(-view.tokens // size) for size in self._sizes]
                ends = tuple(ids[-count:] for ids, count in zip(view.blocks, counts, strict=True))
                view = BlockView(view.request, ends, view.skip, view.tokens)
            return super()._view(job, view)

    worker = _Worker


class CountsFromItsOwn(Broken):
    """Moves the blocks of vLLM's own hit to the end of a load's block table."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            if job.kind == "load" and view.skip:
                own = [view.skip // size for size in self._sizes]
                moved = tuple(ids[n:] + ids[:n] for ids, n in zip(view.blocks, own, strict=True))
                view = BlockView(view.request, moved, view.skip, view.tokens)
            return super()._view(job, view)

    worker = _Worker


class MixesGroups(Broken):
    """Rotates the block tables of a load by one group."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            if job.kind == "load":
                view = BlockView(view.request, (*view.blocks[1:], view.blocks[0]), view.skip, view.tokens)
            return super()._view(job, view)

    worker = _Worker


class ForgetsWindows(Broken):
    """Maps the slots of groups with a sliding window to -1, so that loads skip them."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            found = super()._view(job, view)
            assert self._spec is not None
            if job.kind == "load":
                for group, made in enumerate(self._spec.groups):
                    if made.rule.kind == "trailing":
                        found.slots[group].fill_(-1)
            return found

    worker = _Worker


class StoresTheNullBlock(Broken):
    """Ignores residency when storing, and maps slots without a block to slot 0, in the null block."""

    class _Scheduler(ConnectorScheduler):
        def open(self, offers: Any) -> None:
            super().open(offers)
            index = self._plane
            assert index is not None
            index.begin_store = _IgnoresResidency(index).begin_store  # type: ignore[method-assign]

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            found = super()._view(job, view)
            if job.kind == "store":
                for slots in found.slots.values():
                    slots[slots < 0] = 0
            return found

    scheduler, worker = _Scheduler, _Worker


class _IgnoresResidency:
    """`begin_store` of an index, without the residency mask."""

    def __init__(self, index: Index) -> None:
        self._begin = index.begin_store

    def begin_store(self, *args: Any, resident: Any = None, **named: Any) -> Any:
        return self._begin(*args, **named)


class StoresOneTooMany(Broken):
    """Counts a chunk as computed with its first token."""

    class _Scheduler(ConnectorScheduler):
        def _store(self, plane: Plane, tracked: Tracked, scheduled: int, now: float) -> None:
            super()._store(plane, tracked, scheduled + self._chunk - 1, now)

    scheduler = _Scheduler


# ---------------------------------------------------------------- contents


class _TouchesPages(ConnectorWorker):
    """Modifies vLLM's blocks after they have been loaded."""

    caches: Mapping[str, torch.Tensor] = {}

    def register_kv_caches(self, caches: Mapping[str, torch.Tensor]) -> None:
        super().register_kv_caches(caches)
        self.caches = caches

    def start_load_kv(self) -> None:
        super().start_load_kv()
        size = self._sizes[0]
        for view in [self._loads[job.id] for job in loads_of(self) if job.id in self._loads]:
            blocks = view.blocks[0][view.skip // size : view.tokens // size]
            self._touch([cache[block] for cache in self.caches.values() for block in blocks])

    def _touch(self, pages: list[torch.Tensor]) -> None:
        """Modifies the pages, each `(head, slot, content)`, in place."""


class ServesOnce(Broken):
    """Zeroes the pages of every load but the first."""

    class _Worker(_TouchesPages):
        loads = 0

        def _touch(self, pages: list[torch.Tensor]) -> None:
            self.loads += 1
            for page in pages if self.loads > 1 else ():
                page.zero_()

    worker = _Worker


class SwapsKeysAndValues(Broken):
    """Swaps the two halves of every loaded page."""

    class _Worker(_TouchesPages):
        def _touch(self, pages: list[torch.Tensor]) -> None:
            for page in pages:
                halves = page.reshape(page.shape[0], -1)
                page.copy_(halves.roll(halves.shape[1] // 2, 1).reshape(page.shape))

    worker = _Worker


class BelievesTheShape(Broken):
    """Assumes the layout that a tensor's shape suggests, K and V of a token side by side, instead of proving one."""

    class _Worker(ConnectorWorker):
        def _open(self, caches: Mapping[str, torch.Tensor]) -> None:
            super()._open(caches)
            from lmcache.layout import Layout, PagedKV

            assert self._spec is not None
            spec, config = self._spec, self._kv_config
            layouts = {0: Layout.parse("block head slot (kv dim)", block_tokens=self._sizes[0])}
            names = sorted(config.kv_cache_groups[0].layer_names)
            self._kv = PagedKV({0: [caches[name] for name in names]}, layouts).bind(spec)

    worker = _Worker


class MisreadsTheDisk(Broken):
    """Labels objects read in canonical order with vLLM's native layout."""

    class _Worker(ConnectorWorker):
        def _open(self, caches: Mapping[str, torch.Tensor]) -> None:
            super()._open(caches)
            assert self._rank is not None
            assert self._spec is not None
            self._rank.transfer.tier_copier._codec = _LabelsAsNative(self, self._spec, self._chunk)

    worker = _Worker


class _LabelsAsNative(ObjectCodec):
    def __init__(self, worker: ConnectorWorker, *args: Any) -> None:
        super().__init__(*args)
        self._worker = worker

    def load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        loaded = super().load(tier, id, out, None, deadline)
        if loaded.layout is None or self._worker._kv is None:
            return loaded
        return Loaded(loaded.result, self._worker._kv.native(id.group, self._chunk_tokens))


# ---------------------------------------------------------------- reports and capacity


class ReportsWhatItDoesNotUse(Broken):
    """Records the hit that a lookup finds, and reports no hit to vLLM."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Records what would be loaded; returns no hit."""
        found, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found is None:
            return None, False
        if found and self._scheduler is not None:
            tiers = self._scheduler.sources(request, found)
            self.seen[request.request_id] = Observed(num_computed_tokens, found, tiers)
        return 0, False


class DeafToFullMemory(Broken):
    """Raises in a step that evicted something; the connector starts anew each time, then disables the cache for good."""

    class _Scheduler(ConnectorScheduler):
        def build_connector_meta(self, output: Any) -> Any:
            evicted = self._plane.evictions if self._plane is not None else 0
            meta = super().build_connector_meta(output)
            if self._plane is not None and self._plane.evictions > evicted:
                raise MemoryError("the RAM tier is full")
            return meta

    scheduler = _Scheduler


# ---------------------------------------------------------------- fault injection, for the adapter's own tests


class ForgetsLeases(Broken):
    """Releases the lease of a request when vLLM has allocated its blocks."""

    class _Scheduler(ConnectorScheduler):
        def update_state_after_alloc(self, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
            if tokens and self._plane is not None:
                self._plane.release(request.request_id)
            super().update_state_after_alloc(request, blocks, tokens)

    scheduler = _Scheduler


class SchedulerRaises(Broken):
    """The scheduler side raises in `method`, from its first hit on, `times` times."""

    class _Scheduler(ConnectorScheduler):
        method = "get_num_new_matched_tokens"
        times = 1 << 30
        hit = False

        def _raise(self, method: str) -> None:
            if method == self.method and self.hit and self.times:
                self.times -= 1
                raise RuntimeError(f"broken on purpose, in {method}")

        def get_num_new_matched_tokens(self, request: Any, local: int) -> int | None:
            found = super().get_num_new_matched_tokens(request, local)
            self.hit = self.hit or bool(found)
            self._raise("get_num_new_matched_tokens")
            return found

        def update_state_after_alloc(self, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
            self._raise("update_state_after_alloc")
            super().update_state_after_alloc(request, blocks, tokens)

        def build_connector_meta(self, output: Any) -> Any:
            self._raise("build_connector_meta")
            return super().build_connector_meta(output)

        def update_connector_output(self, meta: Any) -> None:
            self._raise("update_connector_output")
            super().update_connector_output(meta)

    scheduler = _Scheduler


class RaisesInAllocated(SchedulerRaises):
    """See `SchedulerRaises`."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "update_state_after_alloc"

    scheduler = _Scheduler


class RaisesInStep(SchedulerRaises):
    """See `SchedulerRaises`."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "build_connector_meta"

    scheduler = _Scheduler


class RaisesOnceInReported(SchedulerRaises):
    """See `SchedulerRaises`: once."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "update_connector_output"
        times = 1

    scheduler = _Scheduler


class SchedulerRaisesOnce(SchedulerRaises):
    """See `SchedulerRaises`: once."""

    class _Scheduler(SchedulerRaises._Scheduler):
        times = 1

    scheduler = _Scheduler


class RaisesOnceInAllocated(SchedulerRaises):
    """See `SchedulerRaises`: once."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "update_state_after_alloc"
        times = 1

    scheduler = _Scheduler


class RaisesOnceInStep(SchedulerRaises):
    """See `SchedulerRaises`: once."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "build_connector_meta"
        times = 1

    scheduler = _Scheduler


class RaisesOnceInStore(SchedulerRaises):
    """See `SchedulerRaises`: once."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "_store"
        times = 1

        def _store(self, plane: Plane, tracked: Tracked, scheduled: int, now: float) -> None:
            self._raise("_store")
            super()._store(plane, tracked, scheduled, now)

    scheduler = _Scheduler


class RaisesOnceWhileLoading(Broken):
    """The scheduler side raises once in a step while a load is under way, whose result the worker reports three steps late."""

    class _Scheduler(ConnectorScheduler):
        times = 1

        def build_connector_meta(self, output: Any) -> Any:
            jobs = self._plane.state.jobs.live.values() if self._plane is not None else ()
            if self.times and any(job.kind == "load" for job in jobs) and not self._views:
                self.times -= 1
                raise RuntimeError("broken on purpose, while a load is under way")
            return super().build_connector_meta(output)

    class _Worker(ConnectorWorker):
        late = 3

        def get_transfer_results(self) -> LoadResults:
            if self.late and (self._loads or self._void):
                self.late -= 1
                return LoadResults()
            return super().get_transfer_results()

    scheduler, worker = _Scheduler, _Worker


class WorkerRaises(Broken):
    """The worker side raises in `method`, in every step that has a load, `times` times."""

    class _Worker(ConnectorWorker):
        method = "start_load_kv"
        times = 1 << 30

        def _raise(self, method: str) -> None:
            if method == self.method and (self._loads or loads_of(self)) and self.times:
                self.times -= 1
                raise RuntimeError(f"broken on purpose, in {method}")

        def bind_connector_metadata(self, step: Any) -> None:
            if self.method == "bind_connector_metadata" and any(job.kind == "load" for job in step.plan.jobs):
                raise RuntimeError("broken on purpose, in bind_connector_metadata")
            super().bind_connector_metadata(step)

        def start_load_kv(self) -> None:
            self._raise("start_load_kv")
            super().start_load_kv()

        def _view(self, job: Job, view: BlockView) -> EngineView:
            self._raise("_view")
            return super()._view(job, view)

        def wait_for_save(self) -> None:
            super().wait_for_save()
            self._raise("wait_for_save")

        def _ended(self, found: LoadResults, load: BlockView, report: JobReport) -> None:
            super()._ended(found, load, report)
            self._raise("_ended")

        def build_connector_worker_meta(self) -> Any:
            self._raise("build_connector_worker_meta")
            return super().build_connector_worker_meta()

    worker = _Worker


class WorkerRaisesInBind(Broken):
    """See `WorkerRaises`."""

    class _Worker(WorkerRaises._Worker):
        method = "bind_connector_metadata"

    worker = _Worker


class RaisesOnceInView(Broken):
    """See `WorkerRaises`: once, before the load begins."""

    class _Worker(WorkerRaises._Worker):
        method = "_view"
        times = 1

    worker = _Worker


class RaisesOnceInEnded(Broken):
    """See `WorkerRaises`: once, after the load has ended, before it is reported."""

    class _Worker(WorkerRaises._Worker):
        method = "_ended"
        times = 1

    worker = _Worker


class WorkerRaisesInResults(Broken):
    """See `WorkerRaises`: after loads have ended, before they are reported."""

    class _Worker(WorkerRaises._Worker):
        method = "get_transfer_results"

        def get_transfer_results(self) -> LoadResults:
            self._raise("get_transfer_results")
            return super().get_transfer_results()

    worker = _Worker
