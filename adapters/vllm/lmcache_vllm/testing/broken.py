"""vLLM connectors, each broken in one way that has happened to somebody. `lmcache_vllm.testing.mutants` runs the suite on them.

They break one half of the connector; vLLM, its recomputation and everything below stay as they are. The last ones are not
wrong but unlucky: a load fails, a half raises. What must come of that is in the adapter's own tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lmcache.config import Config
from lmcache.control import Index
from lmcache.format.codec import Loaded, ObjectCodec
from lmcache.keys import Chain, ObjectId, as_tokens, chain_of
from lmcache.layout import ObjectLayout
from lmcache.plan import ArenaSlot, Copy, Job, JobReport
from lmcache.tiers.base import Tier
from lmcache.transfer.jobs import EngineView
from lmcache_vllm.messages import BlockView
from lmcache_vllm.scheduler import ConnectorScheduler, Tracked
from lmcache_vllm.testing.session import Observed, ObservedConnector
from lmcache_vllm.worker import ConnectorWorker, LoadResults

SEPARATOR = "\0"


class Broken(ObservedConnector):
    """A connector with other halves, or with `settings` that nobody asked for."""

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
    """ArenaSlot `lost` of a load holds something else by now, as after a failure that nobody has noticed; `times` times."""

    lost: ClassVar[int] = 0
    times = 1 << 30

    def start_loads(self) -> None:
        """See the class."""
        for job in loads_of(self)[: self.times]:
            self.times -= 1
            op = job.ops[self.lost % len(job.ops)]
            if isinstance(op, Copy) and isinstance(op.src, ArenaSlot) and self._transfer is not None:
                self._transfer._tracker.claim(op.name.group, op.src.index)
        super().start_loads()


def loads_of(half: ConnectorWorker) -> list[Job]:
    """The loads of this step."""
    return [job for job in half._step.plan.jobs if job.kind == "load"] if half._step is not None else []


class LosesFirst(Broken):
    """The first object of every load is gone when it begins."""

    worker = LosesSlots


class LosesMiddle(Broken):
    """The third object of every load is gone when it begins."""

    class _Worker(LosesSlots):
        lost = 2

    worker = _Worker


class LosesOnce(Broken):
    """The third object of the first load is gone when it begins."""

    class _Worker(LosesSlots):
        lost = 2
        times = 1

    worker = _Worker


class IgnoresFailedLoads(Broken):
    """A load that failed is reported as one that went well."""

    class _Worker(LosesSlots):
        lost = 2

        def _ended(self, found: LoadResults, load: BlockView, report: JobReport) -> None:
            found.requests.add(load.request)

    worker = _Worker


class ReportsTooLittleLost(Broken):
    """Of a load that failed, the last block is reported as lost; what never arrived before it counts as computed."""

    class _Worker(LosesSlots):
        lost = 2

        def _lost(self, found: LoadResults, view: BlockView) -> None:
            super()._lost(found, view)
            found.blocks = {view.blocks[0][-(-view.tokens // self._sizes[0]) - 1]}

    worker = _Worker


class OffersAgain(Broken):
    """Forgets that a load of this very request has failed, and fetches and offers the same again; it fails again."""

    class _Scheduler(ConnectorScheduler):
        def _offer(self, tracked: Tracked, local: int, *, counted: bool = True) -> int | None:
            if self._index is not None and tracked.request.request_id in self._index.state.failed:
                self._index.state.failed.discard(tracked.request.request_id)
                tracked.fetched = False
            return super()._offer(tracked, local, counted=counted)

    scheduler, worker = _Scheduler, LosesSlots


# ---------------------------------------------------------------- names


class NamesByLength(Broken):
    """KV is found by how long a prompt is, not by what it says: another request's is served."""

    class _Scheduler(ConnectorScheduler):
        def _named(self, tracked: Tracked) -> Chain:
            if len(tracked.chain.digests) < tracked.request.num_tokens // self._chunk:
                tracked.chain = chain_of(tracked.namespace, as_tokens([7] * tracked.request.num_tokens), self._chunk)
            return tracked.chain

    scheduler = _Scheduler


class NamesByProcess(Broken):
    """A new process finds nothing of what others have written."""

    class _Scheduler(ConnectorScheduler):
        def _namespace(self, salt: str, lora: str) -> bytes:
            return super()._namespace(f"{salt}{SEPARATOR}{os.getpid()}", lora)

    scheduler = _Scheduler


class NamesByHashSeed(Broken):
    """Names depend on PYTHONHASHSEED, which forks share and processes do not."""

    class _Scheduler(ConnectorScheduler):
        def _namespace(self, salt: str, lora: str) -> bytes:
            return super()._namespace(f"{salt}{SEPARATOR}{hash('none')}", lora)

    scheduler = _Scheduler


class KnowsNoTenants(Broken):
    """The salt is left out of the name."""

    class _Scheduler(ConnectorScheduler):
        def _namespace(self, salt: str, lora: str) -> bytes:
            return super()._namespace("", lora)

    scheduler = _Scheduler


class TrustsTheName(Broken):
    """A model is what it is called, whatever its weights are now."""

    settings: ClassVar[Mapping[str, Any]] = {"model_identity": "my-model"}


# ---------------------------------------------------------------- blocks


class TakesTheWrongEnd(Broken):
    """A prefix's blocks are counted from the end of the request: what is stored for its beginning is its end."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            if job.kind == "store":
                counts = [-(-view.tokens // size) for size in self._sizes]
                ends = tuple(ids[-count:] for ids, count in zip(view.blocks, counts, strict=True))
                view = BlockView(view.request, ends, view.skip, view.tokens)
            return super()._view(job, view)

    worker = _Worker


class CountsFromItsOwn(Broken):
    """A load's blocks are taken for those beyond vLLM's own hit, though they are all of the request's."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            if job.kind == "load" and view.skip:
                own = [view.skip // size for size in self._sizes]
                moved = tuple(ids[n:] + ids[:n] for ids, n in zip(view.blocks, own, strict=True))
                view = BlockView(view.request, moved, view.skip, view.tokens)
            return super()._view(job, view)

    worker = _Worker


class MixesGroups(Broken):
    """Each group is loaded into the blocks of the next one."""

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            if job.kind == "load":
                view = BlockView(view.request, (*view.blocks[1:], view.blocks[0]), view.skip, view.tokens)
            return super()._view(job, view)

    worker = _Worker


class ForgetsWindows(Broken):
    """A hit restores full attention; sliding windows hold what their blocks held before."""

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
    """What a sliding window has left behind is stored all the same, out of the block that stands for nothing."""

    class _Scheduler(ConnectorScheduler):
        def meet(self, offers: Any) -> None:
            super().meet(offers)
            index = self._index
            assert index is not None
            index.begin_store = _Anything(index).begin_store  # type: ignore[method-assign]

    class _Worker(ConnectorWorker):
        def _view(self, job: Job, view: BlockView) -> EngineView:
            found = super()._view(job, view)
            if job.kind == "store":
                for slots in found.slots.values():
                    slots[slots < 0] = 0
            return found

    scheduler, worker = _Scheduler, _Worker


class _Anything:
    """An index that is not told what is resident."""

    def __init__(self, index: Index) -> None:
        self._begin = index.begin_store

    def begin_store(self, *args: Any, resident: Any = None, **named: Any) -> Any:
        return self._begin(*args, **named)


class StoresOneTooMany(Broken):
    """A chunk is stored as soon as its first token is computed."""

    class _Scheduler(ConnectorScheduler):
        def _store(self, index: Index, tracked: Tracked, scheduled: int, output: Any, now: float) -> None:
            super()._store(index, tracked, scheduled + self._chunk - 1, output, now)

    scheduler = _Scheduler


# ---------------------------------------------------------------- contents


class _TouchesPages(ConnectorWorker):
    """Does something to vLLM's blocks when they have been loaded."""

    caches: Mapping[str, torch.Tensor] = {}

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        super().register(caches)
        self.caches = caches

    def start_loads(self) -> None:
        super().start_loads()
        size = self._sizes[0]
        for view in [self._loads[job.id] for job in loads_of(self) if job.id in self._loads]:
            blocks = view.blocks[0][view.skip // size : view.tokens // size]
            self._touch([cache[block] for cache in self.caches.values() for block in blocks])

    def _touch(self, pages: list[torch.Tensor]) -> None:
        """Each `(head, slot, content)`."""


class ServesOnce(Broken):
    """What was offloaded comes back right the first time only."""

    class _Worker(_TouchesPages):
        loads = 0

        def _touch(self, pages: list[torch.Tensor]) -> None:
            self.loads += 1
            for page in pages if self.loads > 1 else ():
                page.zero_()

    worker = _Worker


class SwapsKeysAndValues(Broken):
    """Two halves of the same shape, taken for each other."""

    class _Worker(_TouchesPages):
        def _touch(self, pages: list[torch.Tensor]) -> None:
            for page in pages:
                halves = page.reshape(page.shape[0], -1)
                page.copy_(halves.roll(halves.shape[1] // 2, 1).reshape(page.shape))

    worker = _Worker


class BelievesTheShape(Broken):
    """No layout is proven: what a tensor's shape suggests is taken for true, K and V of a token side by side."""

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
    """What comes from memory is right; what lies on disk in canonical order is taken for vLLM's own."""

    class _Worker(ConnectorWorker):
        def _open(self, caches: Mapping[str, torch.Tensor]) -> None:
            super()._open(caches)
            assert self._transfer is not None
            assert self._spec is not None
            self._transfer._io = _TakesItForNative(self, self._spec, self._chunk)

    worker = _Worker


class _TakesItForNative(ObjectCodec):
    def __init__(self, half: ConnectorWorker, *args: Any) -> None:
        super().__init__(*args)
        self._half = half

    def load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        loaded = super().load(tier, id, out, None, deadline)
        if loaded.layout is None or self._half._kv is None:
            return loaded
        return Loaded(loaded.result, self._half._kv.native(id.group, self._chunk_tokens))


# ---------------------------------------------------------------- what is said and done


class ReportsWhatItDoesNotUse(Broken):
    """Computes everything, and reports as a hit what it found."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Nothing, after a look at what there would be."""
        found, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found is None:
            return None, False
        if found and self._scheduler is not None:
            tiers = self._scheduler.sources(request, found)
            self.seen[request.request_id] = Observed(num_computed_tokens, found, tiers)
        return 0, False


class ClearsMemoryOnly(Broken):
    """`clear` returns, and the disk still serves."""

    class _Scheduler(ConnectorScheduler):
        def clear(self, salt: str | None = None) -> bool:
            done = super().clear(salt)
            self._clear_requests = []
            return done

    scheduler = _Scheduler


class DeafToFullMemory(Broken):
    """A store that finds no room is an error for whoever asked; the guard then switches the cache off for good."""

    class _Scheduler(ConnectorScheduler):
        def _store(self, index: Index, tracked: Tracked, scheduled: int, output: Any, now: float) -> None:
            evicted = index.evictions
            super()._store(index, tracked, scheduled, output, now)
            if index.evictions > evicted:
                raise MemoryError("the RAM tier is full")

    scheduler = _Scheduler


# ---------------------------------------------------------------- misfortune, for the adapter's own tests


class ForgetsLeases(Broken):
    """What was offered is gone when vLLM has made room for it."""

    class _Scheduler(ConnectorScheduler):
        def allocated(self, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
            if tokens and self._index is not None:
                self._index.release(request.request_id)
            super().allocated(request, blocks, tokens)

    scheduler = _Scheduler


class SchedulerRaises(Broken):
    """The scheduler half fails in `method`, from its first hit on."""

    method: ClassVar[str] = "matched"

    class _Scheduler(ConnectorScheduler):
        method = "matched"
        hit = False

        def _raise(self, method: str) -> None:
            if method == self.method and self.hit:
                raise RuntimeError(f"broken on purpose, in {method}")

        def matched(self, request: Any, local: int) -> int | None:
            found = super().matched(request, local)
            self.hit = self.hit or bool(found)
            self._raise("matched")
            return found

        def allocated(self, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
            self._raise("allocated")
            super().allocated(request, blocks, tokens)

        def step(self, output: Any) -> Any:
            self._raise("step")
            return super().step(output)

        def reported(self, meta: Any) -> None:
            self._raise("reported")
            super().reported(meta)

    scheduler = _Scheduler


class RaisesInAllocated(SchedulerRaises):
    """See `SchedulerRaises`."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "allocated"

    scheduler = _Scheduler


class RaisesInStep(SchedulerRaises):
    """See `SchedulerRaises`."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "step"

    scheduler = _Scheduler


class RaisesInReported(SchedulerRaises):
    """See `SchedulerRaises`."""

    class _Scheduler(SchedulerRaises._Scheduler):
        method = "reported"

    scheduler = _Scheduler


class WorkerRaises(Broken):
    """The worker half fails in `method`, in every step that has a load."""

    class _Worker(ConnectorWorker):
        method = "start_loads"

        def _raise(self, method: str) -> None:
            if method == self.method and (self._loads or loads_of(self)):
                raise RuntimeError(f"broken on purpose, in {method}")

        def bind(self, step: Any) -> None:
            if self.method == "bind" and any(job.kind == "load" for job in step.plan.jobs):
                raise RuntimeError("broken on purpose, in bind")
            super().bind(step)

        def start_loads(self) -> None:
            self._raise("start_loads")
            super().start_loads()

        def _view(self, job: Job, view: BlockView) -> EngineView:
            self._raise("_view")
            return super()._view(job, view)

        def start_stores(self) -> None:
            super().start_stores()
            self._raise("start_stores")

        def _ended(self, found: LoadResults, load: BlockView, report: JobReport) -> None:
            super()._ended(found, load, report)
            if self.method == "landed":
                raise RuntimeError("broken on purpose, in landed")

        def report(self) -> Any:
            self._raise("report")
            return super().report()

    worker = _Worker


class WorkerRaisesInBind(Broken):
    """See `WorkerRaises`."""

    class _Worker(WorkerRaises._Worker):
        method = "bind"

    worker = _Worker


class WorkerRaisesInView(Broken):
    """See `WorkerRaises`: the load is known, and was not begun."""

    class _Worker(WorkerRaises._Worker):
        method = "_view"

    worker = _Worker


class WorkerRaisesInLanded(Broken):
    """See `WorkerRaises`: the load has ended, and nobody was told."""

    class _Worker(WorkerRaises._Worker):
        method = "landed"

    worker = _Worker
