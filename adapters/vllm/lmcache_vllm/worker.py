"""The worker half: owns one rank's arenas and tiers, and carries out plans on the KV tensors that vLLM registered.

It decides nothing. Loads and tier traffic of a step are started beside the forward pass, stores when it has been submitted;
what has come of them goes back with the step's output.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from lmcache.config import Config
from lmcache.control.admission import admits
from lmcache.errors import LMCacheError
from lmcache.format.codec import ObjectCodec
from lmcache.layout.bound import BoundKV
from lmcache.memory import anonymous, host_provider, pinned
from lmcache.observe.log import Throttle, info
from lmcache.observe.metrics import Metrics
from lmcache.plan import Job, JobReport, Plan, Report, Status, TierFacts
from lmcache.spec import KVSpec
from lmcache.tiers import open_tiers
from lmcache.tiers.base import Tier, usable_bytes
from lmcache.transfer import Transfer
from lmcache.transfer.arena import Arena, share_out
from lmcache.transfer.engine_copy import open_copier
from lmcache.transfer.jobs import EngineView
from lmcache_vllm import compat
from lmcache_vllm.compat import UnsupportedError
from lmcache_vllm.geometry import identity_of, rounded_chunk, spec_of
from lmcache_vllm.layouts import prove_layout
from lmcache_vllm.messages import BlockView, ClearRequest, Offer, RankMeta, StepMeta

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_CLOSE_S = 5.0
_AHEAD_BYTES = 256 << 20
"""Host memory made present before it is needed."""

_IDLE_WAIT_S = 0.002
"""How long a step without a forward pass may wait for news, rather than spin."""


class LoadResults:
    """Loads that ended in the step: all of them, those that failed, and the blocks that hold nothing now."""

    __slots__ = ("blocks", "failed", "requests")

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.failed: set[str] = set()
        self.blocks: set[int] = set()

    def lost(self, view: BlockView, block_tokens: Sequence[int]) -> None:
        """A load ended, and what it was for has to be computed. `block_tokens`: of each group."""
        self.requests.add(view.request)
        self.failed.add(view.request)
        for blocks, size in zip(view.blocks, block_tokens, strict=True):
            self.blocks.update(blocks[view.skip // size : -(-view.tokens // size)])
        self.blocks.discard(0)


class Worker(Protocol):
    """What a connector asks of a worker: the half, or its stand-in."""

    metrics: Metrics

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Take up vLLM's KV tensors."""
        ...

    def offer(self) -> Offer:
        """For the scheduler half."""
        ...

    def bind(self, step: StepMeta) -> None:
        """What this step is to do."""
        ...

    def start_loads(self) -> None:
        """Everything but stores."""
        ...

    def start_stores(self) -> None:
        """What the forward pass has computed."""
        ...

    def landed(self) -> LoadResults:
        """Loads that ended since the last call."""
        ...

    def report(self) -> RankMeta | None:
        """For the scheduler half; None where there is nothing to say."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


class ConnectorWorker:
    """See the module.

    Args:
        vllm_config, kv_config: as vLLM hands them to a connector.
        config: settings.
    """

    def __init__(self, vllm_config: VllmConfig, kv_config: KVCacheConfig, config: Config) -> None:
        self._vllm_config = vllm_config
        self._kv_config = kv_config
        self._config = config
        self._log = Throttle()
        self.metrics = Metrics()
        self.rank, self.ranks = compat.worker_rank()
        self._chunk = rounded_chunk(kv_config, config.chunk_tokens)
        self._sizes = [int(group.kv_cache_spec.block_size) for group in kv_config.kv_cache_groups]
        self.disabled = "vLLM has registered no KV cache"
        self._spec: KVSpec | None = None
        self._kv: BoundKV | None = None
        self._transfer: Transfer | None = None
        self._tiers: list[Tier] = []
        self._slots: tuple[int, ...] = ()
        self._step: StepMeta | None = None
        self._point: object = None
        self._loads: dict[int, BlockView] = {}
        self._reported: Report | None = None
        self._seen = -1  # the transfer's news when its report was last taken
        self._cleared = 0
        self._clearing: threading.Thread | None = None

    # ---------------------------------------------------------------- start-up

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Take up vLLM's KV tensors: describe, prove, allocate. Whatever is in the way disables this worker."""
        try:
            self._open(caches)
            self.disabled = ""
        except (UnsupportedError, LMCacheError) as error:
            self.disabled = str(error)
        except Exception as error:  # vLLM's internals may have changed
            self.disabled = f"{type(error).__name__}: {error}"
        if self.disabled:
            self.metrics.failed("open", "unsupported")
            info("cache-disabled", rank=self.rank, reason=self.disabled)  # the scheduler half warns, once for all ranks
            if self._config.strict:
                raise RuntimeError(f"LMCache cannot cache here, and strict is set: {self.disabled}")

    def _open(self, caches: Mapping[str, torch.Tensor]) -> None:
        layers = compat.attention_layers(self._vllm_config)
        compat.check_layers(layers)
        identity = identity_of(self._vllm_config, self._config.model_identity, self._config.fingerprint)
        spec = spec_of(self._vllm_config, self._kv_config, layers, rank=self.rank, ranks=self.ranks, identity=identity)
        kv, layout = prove_layout(spec, self._kv_config, caches, layers)
        self._tiers = open_tiers(self._config, self.metrics, self._log)
        sizes = [spec.object_bytes(group, self._chunk) for group in range(len(spec.groups))]
        budget = (self._config.dram_bytes or (self._config.queue_bytes if self._tiers else 0)) // self.ranks
        self._slots = tuple(share_out(budget, sizes))
        provider, memory = host_provider(self._config.pin_memory)
        ahead = _AHEAD_BYTES // len(sizes) if provider is anonymous else 0  # pinned memory is taken now
        self._spec, self._kv = spec, kv.bind(spec)
        arenas = [
            Arena(n, size, provider, ahead_bytes=ahead, reserve=provider is pinned)
            for n, size in zip(self._slots, sizes, strict=True)
        ]
        self._transfer = Transfer(
            spec,
            self._chunk,
            arenas,
            self._tiers,
            io=ObjectCodec(spec, self._chunk, order=self._config.disk_order, reslice=self._config.share == "semantic"),
            metrics=self.metrics,
            log=self._log,
            rank=self.rank,
            read_threads=self._config.io_threads,
            write_threads=self._config.io_threads,
            queue_bytes=self._config.queue_bytes // self.ranks,
            open_copier=partial(
                open_copier,
                staging_bytes=self._config.staging_bytes,
                copy_engine_bytes=self._config.copy_engine_bytes,
            ),
        )
        if admits(self._config):
            for position, tier in enumerate(self._tiers):
                if usable_bytes(tier) is not None:
                    self._transfer.look(position)
        info(
            "cache-open",
            rank=f"{self.rank}/{self.ranks}",
            layout=layout,
            chunk_tokens=self._chunk,
            slots=self._slots,
            memory=memory,
            tiers=[tier.name for tier in self._tiers],
        )

    def offer(self) -> Offer:
        """For the scheduler half."""
        tiers = tuple((tier.name, tier.shared) for tier in self._tiers)
        capacities = tuple(usable_bytes(tier) for tier in self._tiers)
        return Offer(self.rank, self._spec, self._slots, tiers, capacities, tuple(self._facts()), self.disabled)

    def _facts(self) -> list[TierFacts]:
        return self._transfer.facts() if self._transfer is not None and admits(self._config) else []

    # ---------------------------------------------------------------- a step

    def bind(self, step: StepMeta) -> None:
        """What this step is to do."""
        self._step = step
        self._reported = None
        # Before this step's forward pass, which computes other requests' blocks: a load need not wait for it.
        self._point = None
        if self._transfer is not None and self._kv is not None and step.plan.jobs:
            self._point = self._transfer.point(self._kv)

    def start_loads(self) -> None:
        """Everything but stores."""
        if self._step is not None:
            self._execute(self._step, stores=False)
            self._clear(self._step.clear_requests)

    def start_stores(self) -> None:
        """What the forward pass has computed. On return vLLM may overwrite it."""
        if self._step is not None:
            self._execute(self._step, stores=True)

    def _execute(self, step: StepMeta, *, stores: bool) -> None:
        jobs = tuple(job for job in step.plan.jobs if (job.kind == "store") == stores)
        if self._transfer is None or (not jobs and stores):
            return
        views = {}
        for job in jobs:
            block_view = step.views.get(job.id)
            if block_view is not None:
                if job.kind == "load":  # vLLM waits for it from here on, whatever happens
                    self._loads[job.id] = block_view
                views[job.id] = self._view(job, block_view)
        after = None if stores else self._point
        self._transfer.execute(Plan(step.plan.epoch, jobs, step.plan.acked), views, after)

    def _view(self, job: Job, view: BlockView) -> EngineView:
        assert self._kv is not None
        skip = view.skip if job.kind == "load" else 0
        slots = {
            group: slots_of(blocks, size, view.tokens, skip)
            for group, (blocks, size) in enumerate(zip(view.blocks, self._sizes, strict=True))
        }
        return EngineView(self._kv, slots)

    # ---------------------------------------------------------------- what has come of it

    def landed(self) -> LoadResults:
        """Loads that ended since the last call. After it no call of theirs writes into vLLM's memory."""
        found = LoadResults()
        step = self._step
        for view in step.refused if step is not None else ():
            self._lost(found, view)
        transfer = self._transfer
        if transfer is None:
            return found
        if step is not None and step.idle and transfer.running():
            transfer.wait(self._seen, _IDLE_WAIT_S)
        self._seen = transfer.news
        self._reported = transfer.poll()
        ended = [report for report in self._reported.jobs if report.job in self._loads]
        for report in ended:
            if not report.final:
                transfer.fence([report.job])
            self._ended(found, self._loads[report.job], report)
        for report in ended:  # not before all have been answered: until then they are owed
            del self._loads[report.job]
        return found

    def _ended(self, found: LoadResults, load: BlockView, report: JobReport) -> None:
        if all(status == Status.OK for status in report.statuses):
            found.requests.add(load.request)
        else:
            self._log.warning("load-failed", request=load.request, reason=_reason(report))
            self._lost(found, load)

    def _lost(self, found: LoadResults, view: BlockView) -> None:
        found.lost(view, self._sizes)

    def report(self) -> RankMeta | None:
        """For the scheduler half; None where there is nothing to say."""
        reports = [self._reported] if self._reported is not None and self._reported.jobs else []
        cleared = {self.rank: self._cleared} if self._cleared else {}
        facts = {self.rank: known} if reports and (known := self._facts()) else {}
        return RankMeta(reports, cleared, facts) if reports or cleared else None

    # ---------------------------------------------------------------- the rest

    def _clear(self, clear_requests: Sequence[ClearRequest]) -> None:
        """Empty the tiers in a thread of its own: a large folder takes a while."""
        new = [request for request in clear_requests if request.number > self._cleared]
        if not new or (self._clearing is not None and self._clearing.is_alive()):
            return
        self._clearing = threading.Thread(target=partial(self._clear_tiers, new), name="lmcache-clear", daemon=True)
        self._clearing.start()

    def _clear_tiers(self, clear_requests: Sequence[ClearRequest]) -> None:
        for request in clear_requests:
            for position, tier in enumerate(self._tiers):
                self._clear_tier(position, tier, request)
            self._cleared = request.number

    def _clear_tier(self, position: int, tier: Tier, request: ClearRequest) -> None:
        try:
            for namespace in (None,) if request.namespaces is None else request.namespaces:
                tier.clear(namespace)
            if self._transfer is not None and admits(self._config) and usable_bytes(tier) is not None:
                self._transfer.look(position)
        except Exception as error:
            self.metrics.failed("clear", tier.name)
            self._log.warning("clear-failed", tier=tier.name, error=f"{type(error).__name__}: {error}")

    def flush(self) -> None:
        """What has been written is visible to others."""
        for tier in self._tiers:
            tier.flush(durable=False)

    def close(self) -> None:
        """Finish write-behind, end all threads, release the tiers."""
        if self._transfer is None:
            return
        transfer, self._transfer = self._transfer, None
        if transfer.close(_CLOSE_S):
            for tier in self._tiers:
                tier.close()
        else:
            self._log.warning("close-incomplete", reason="a tier call still hangs; its threads are left behind")

    def switch_off(self, step: StepMeta | None) -> FailedWorker:
        """What answers in place of this half, which has raised; with `step`, from within that step on."""
        if self._transfer is not None:
            self._transfer.fence(tuple(self._loads), _CLOSE_S)  # no load of ours may write what vLLM computes anew
        return FailedWorker(self, self._loads, self._sizes, self._transfer, step)


class FailedWorker:
    """Stands in for a worker half that raised: all that is asked of it fails at once, so that nobody waits.

    To vLLM, loads that the half owed an answer and loads of later steps have failed; to the index, all jobs that the
    transfer does not report. What is loaded, fetched or stored then ceases to exist there, and soon nothing is offered.

    Args:
        half: the half that raised.
        owed: its loads that vLLM still waits for.
        sizes: tokens a block, of each group.
        transfer: the half's, whose write-behind goes on.
        step: the step under way, if its loads were not answered yet.
    """

    def __init__(
        self,
        half: ConnectorWorker,
        owed: Mapping[int, BlockView],
        sizes: Sequence[int],
        transfer: Transfer | None,
        step: StepMeta | None,
    ) -> None:
        self.metrics = half.metrics
        self._half = half
        self._owed = dict(owed)
        self._sizes = sizes
        self._transfer = transfer
        self._step: StepMeta | None = None
        if step is not None:
            self.bind(step)

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""

    def offer(self) -> Offer:
        """Nothing, and why."""
        return Offer(self._half.rank, None, disabled="the worker half is switched off; its log says why")

    def bind(self, step: StepMeta) -> None:
        """A step; its loads are owed from here on."""
        self._step = step
        loads = [job.id for job in step.plan.jobs if job.kind == "load"]
        self._owed.update({job: step.views[job] for job in loads if job in step.views})

    def start_loads(self) -> None:
        """Nothing."""

    def start_stores(self) -> None:
        """Nothing."""

    def landed(self) -> LoadResults:
        """All that is owed, as failed."""
        found = LoadResults()
        refused = self._step.refused if self._step is not None else ()
        for view in (*refused, *self._owed.values()):
            found.lost(view, self._sizes)
        self._owed = {}
        return found

    def report(self) -> RankMeta | None:
        """What the transfer says, and of all other jobs of the step that they failed."""
        if self._transfer is None or self._step is None:
            return None
        report = self._transfer.poll()
        known = {job.job for job in report.jobs}
        failed = [
            JobReport(job.id, (int(Status.FAILED),) * len(job.ops), True, 0, "the worker half is switched off")
            for job in self._step.plan.jobs
            if job.id not in known
        ]
        jobs = (*report.jobs, *failed)
        return RankMeta([msgspec.structs.replace(report, jobs=jobs)]) if jobs else None

    def close(self) -> None:
        """As the half."""
        self._half.close()


def slots_of(blocks: list[int], block_tokens: int, tokens: int, skip: int) -> torch.Tensor:
    """Slots of a request's first `tokens` tokens: int64, −1 for the first `skip`, null blocks, and what has no block."""
    ids = torch.tensor(blocks[: -(-tokens // block_tokens)], dtype=torch.int64)
    table = ids[:, None] * block_tokens + torch.arange(block_tokens)
    table[ids == 0] = -1
    slots = torch.full((tokens,), -1, dtype=torch.int64)
    flat = table.view(-1)[:tokens]
    slots[: len(flat)] = flat
    slots[:skip] = -1
    return slots


def _reason(report: JobReport) -> str:
    bad = [Status(status).name.lower() for status in report.statuses if status != Status.OK]
    return report.detail or (bad[0] if bad else "unknown")
