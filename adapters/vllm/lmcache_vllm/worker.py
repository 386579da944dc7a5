"""The connector's worker side: owns one rank's data plane and executes plans on the KV tensors that vLLM registered.

It makes no decisions. Loads and tier traffic of a step run concurrently with the forward pass, stores after it; reports return
with the step's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from lmcache.adapter import record_failure
from lmcache.config import Config
from lmcache.control.outcomes import TierInfo
from lmcache.errors import LMCacheError
from lmcache.layout.bound import BoundKV
from lmcache.observe.log import Throttle, info
from lmcache.observe.metrics import Metrics
from lmcache.plan import Job, JobReport, Plan, Report, Status, TierFacts
from lmcache.spec import KVSpec
from lmcache.tiers.base import usable_bytes
from lmcache.transfer.jobs import EngineView, JobTracker
from lmcache.transfer.rank import CLOSE_S, Rank, open_rank
from lmcache_vllm import compat
from lmcache_vllm.compat import UnsupportedError
from lmcache_vllm.geometry import identity_of, parts_of, rounded_chunk, spec_of
from lmcache_vllm.layouts import prove_layout
from lmcache_vllm.messages import BlockView, Offer, RankMeta, StepMeta
from lmcache_vllm.probe import probe

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_PREFAULT_BYTES = 256 << 20
"""Bytes of host memory that are prefaulted ahead of use: vLLM waits for stores between two forward passes."""

_IDLE_WAIT_S = 0.002
"""Seconds that a step without a forward pass waits for a job to end, so that an idle engine does not spin."""


class LoadResults:
    """Loads that ended in a step: all requests, the failed ones, and the blocks whose content is undefined."""

    __slots__ = ("blocks", "failed", "requests")

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.failed: set[str] = set()
        self.blocks: set[int] = set()

    def add_failed(self, view: BlockView, block_tokens: Sequence[int]) -> None:
        """Adds a load that failed: vLLM recomputes its tokens. `block_tokens`: tokens per block of each group."""
        self.requests.add(view.request)
        self.failed.add(view.request)
        for blocks, size in zip(view.blocks, block_tokens, strict=True):
            self.blocks.update(blocks[view.skip // size : -(-view.tokens // size)])
        self.blocks.discard(0)


class Worker(Protocol):
    """Interface of `ConnectorWorker` and `FailedWorker`."""

    metrics: Metrics

    def register_kv_caches(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Opens the cache on vLLM's KV tensors."""
        ...

    def before_sleep(self, tags: Sequence[str]) -> None:
        """Ends all access to vLLM's KV tensors."""
        ...

    def after_wake_up(self, tags: Sequence[str] | None) -> None:
        """Goes on once all memory is back."""
        ...

    def offer(self) -> Offer:
        """Returns what this rank has opened, for the scheduler."""
        ...

    def bind_connector_metadata(self, step: StepMeta) -> None:
        """Takes the work of the next step."""
        ...

    def start_load_kv(self) -> None:
        """Starts all jobs of the step but stores."""
        ...

    def wait_for_save(self) -> None:
        """Stores what the forward pass has computed."""
        ...

    def get_transfer_results(self) -> LoadResults:
        """Returns the loads that ended since the last call."""
        ...

    def build_connector_worker_meta(self) -> RankMeta | None:
        """Returns this rank's report for the scheduler, or None if there is nothing to report."""
        ...

    def shutdown(self) -> None:
        """Releases everything."""
        ...


class ConnectorWorker:
    """See the module.

    Args:
        vllm_config, kv_config: as vLLM passes them to a connector.
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
        self._caches: Mapping[str, torch.Tensor] = {}
        self._asleep: set[str] = set()  # kinds of memory that vLLM has released
        self._rank: Rank | None = None
        self._step: StepMeta | None = None
        self._point: object = None
        self._loads: dict[int, BlockView] = {}
        self._reported: Report | None = None
        self._void: list[BlockView] = []  # loads of an earlier epoch, not reported yet
        self._epoch = 0
        self._seen = -1  # the tracker's `news` when its report was last taken

    # ---------------------------------------------------------------- start-up

    def register_kv_caches(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Opens the cache on vLLM's KV tensors: describes and proves their layout, allocates memory. Any failure disables it."""
        try:
            self._open(caches)
            self.disabled = ""
        except (UnsupportedError, LMCacheError) as error:
            self.disabled = str(error)
        except Exception as error:  # for example, vLLM's internals have changed
            self.disabled = f"{type(error).__name__}: {error}"
        if self.disabled:
            self.metrics.failed("open", "unsupported")
            info("cache-disabled", rank=self.rank, reason=self.disabled)  # the scheduler warns, once for all ranks
            if self._config.strict:
                raise RuntimeError(f"LMCache cannot cache here, and strict is set: {self.disabled}")

    def _open(self, caches: Mapping[str, torch.Tensor]) -> None:
        layers = compat.attention_layers(self._vllm_config)
        compat.check_layers(layers)
        identity = identity_of(self._vllm_config, self._config.model_identity, self._config.fingerprint)
        device = next(iter(caches.values())).device
        bits, left_out = probe(self._vllm_config, self._kv_config, layers, device)
        if left_out:
            info("probe-left-out", rank=self.rank, reason=left_out)
        spec = spec_of(
            self._vllm_config,
            self._kv_config,
            layers,
            rank=self.rank,
            ranks=self.ranks,
            identity=identity,
            measured=bits,
        )
        kv, layout = prove_layout(spec, self._kv_config, caches, layers)
        self._spec, self._kv, self._caches = spec, kv.bind(spec), caches
        self._rank = opened = open_rank(
            self._config,
            spec,
            self.metrics,
            self._log,
            rank=self.rank,
            ranks=self.ranks,
            chunk_tokens=self._chunk,
            prefault_bytes=_PREFAULT_BYTES,
        )
        if self._config.selective:
            opened.measure()
        info(
            "cache-open",
            rank=f"{self.rank}/{self.ranks}",
            layout=layout,
            chunk_tokens=self._chunk,
            slots=opened.slots,
            memory=opened.memory,
            tiers=[tier.name for tier in opened.tiers],
            **parts_of(spec),
        )

    def before_sleep(self, tags: Sequence[str]) -> None:
        """Ends loads under way and fails new jobs: memory of these kinds (`weights`, `kv_cache`) is about to be unmapped.

        Stores have been enqueued by the end of their step, and vLLM waits for the device before it sleeps.
        """
        self._asleep |= set(tags)
        self._kv = None
        if self._rank is not None:
            self._rank.transfer.tracker.fence(tuple(self._loads), None)

    def after_wake_up(self, tags: Sequence[str] | None) -> None:
        """Proves the layout anew once all memory is back; if that fails, raises, and the cache is switched off."""
        self._asleep -= self._asleep if tags is None else set(tags)
        if self._asleep or self._kv is not None or self._spec is None:
            return
        layers = compat.attention_layers(self._vllm_config)
        kv, layout = prove_layout(self._spec, self._kv_config, self._caches, layers)
        self._kv = kv.bind(self._spec)
        info("cache-awake", rank=self.rank, layout=layout)

    def offer(self) -> Offer:
        """Returns what this rank has opened, for the scheduler."""
        opened = self._rank
        if opened is None:
            return Offer(self.rank, self._spec, disabled=self.disabled)
        tiers = tuple(TierInfo(tier.name, tier.shared, usable_bytes(tier)) for tier in opened.tiers)
        return Offer(self.rank, self._spec, opened.slots, tiers, tuple(self._facts()), self.disabled)

    def _facts(self) -> list[TierFacts]:
        opened = self._rank
        return opened.facts() if opened is not None and opened.tiers and self._config.selective else []

    # ---------------------------------------------------------------- steps

    def bind_connector_metadata(self, step: StepMeta) -> None:
        """Takes the work of the next step."""
        self._step = step
        self._reported = None
        if step.plan.epoch != self._epoch and self._rank is not None:
            # The plan voids all jobs; vLLM waits for their results.
            self._rank.transfer.tracker.fence(tuple(self._loads), None)
            self._void += self._loads.values()
            self._loads = {}
            self._epoch = step.plan.epoch
        # Loads may start from this point, before the step's forward pass, which computes other requests' blocks.
        self._point = None
        if self._rank is not None and self._kv is not None and step.plan.jobs:
            self._point = self._rank.transfer.point(self._kv)

    def start_load_kv(self) -> None:
        """Starts all jobs of the step but stores."""
        if self._step is not None:
            self._execute(self._step, stores=False)

    def wait_for_save(self) -> None:
        """Stores what the forward pass has computed; on return vLLM may overwrite it."""
        if self._step is not None:
            self._execute(self._step, stores=True)

    def _execute(self, step: StepMeta, *, stores: bool) -> None:
        jobs = tuple(job for job in step.plan.jobs if (job.kind == "store") == stores)
        if self._rank is None or (not jobs and stores):
            return
        views = {}
        for job in jobs:
            block_view = step.views.get(job.id)
            if block_view is not None:
                if job.kind == "load":  # from here on vLLM waits for its result, even if it fails to start
                    self._loads[job.id] = block_view
                try:
                    views[job.id] = self._view(job, block_view)
                except Exception as error:  # without a view the job fails
                    record_failure(
                        error, "job-failed", self._log, self.metrics, kind=job.kind, request=block_view.request
                    )
        after = None if stores else self._point
        self._rank.transfer.execute(Plan(step.plan.epoch, jobs, step.plan.acked), views, after)

    def _view(self, job: Job, view: BlockView) -> EngineView:
        assert self._kv is not None
        skip = view.skip if job.kind == "load" else 0
        slots = {
            group: slots_of(blocks, size, view.tokens, skip)
            for group, (blocks, size) in enumerate(zip(view.blocks, self._sizes, strict=True))
        }
        return EngineView(self._kv, slots)

    # ---------------------------------------------------------------- results

    def get_transfer_results(self) -> LoadResults:
        """Returns the loads that ended since the last call; they do not write to vLLM's memory any more."""
        found = LoadResults()
        step = self._step
        for view in (*self._void, *(step.refused if step is not None else ())):
            self._mark_failed(found, view)
        self._void = []
        if self._rank is None:
            return found
        tracker = self._rank.transfer.tracker
        if step is not None and step.idle and tracker.running():
            tracker.wait(self._seen, _IDLE_WAIT_S)
        self._seen = tracker.news
        self._reported = tracker.report()
        ended = [report for report in self._reported.jobs if report.job in self._loads]
        for report in ended:
            if not report.final:
                tracker.fence([report.job], None)
            load = self._loads[report.job]
            try:
                self._ended(found, load, report)
            except Exception as error:
                record_failure(error, "job-failed", self._log, self.metrics, kind="load", request=load.request)
                found.add_failed(load, self._sizes)
        for report in ended:  # only once all are in the result: if this raises, `FailedWorker` reports them
            del self._loads[report.job]
        return found

    def _ended(self, found: LoadResults, load: BlockView, report: JobReport) -> None:
        if all(status == Status.OK for status in report.statuses):
            found.requests.add(load.request)
        else:
            self._log.warning("load-failed", request=load.request, reason=_reason(report))
            self._mark_failed(found, load)

    def _mark_failed(self, found: LoadResults, view: BlockView) -> None:
        found.add_failed(view, self._sizes)

    def build_connector_worker_meta(self) -> RankMeta | None:
        """Returns this rank's report for the scheduler, or None if there is nothing to report."""
        reports = [self._reported] if self._reported is not None and self._reported.jobs else []
        facts = {self.rank: known} if reports and (known := self._facts()) else {}
        cleared = self._rank.cleared_elsewhere() if self._rank is not None else []
        return RankMeta(reports, facts, cleared=cleared) if reports or cleared else None

    # ---------------------------------------------------------------- flush, shutdown

    def flush(self) -> None:
        """Waits until everything written to the tiers is visible to other processes."""
        if self._rank is not None:
            self._rank.flush()

    def shutdown(self) -> None:
        """Finishes write-back, ends all threads, releases the tiers."""
        opened, self._rank = self._rank, None
        if opened is not None:
            opened.close()

    def switch_off(self, step: StepMeta | None) -> FailedWorker:
        """Returns the replacement of this worker, which has raised; `step` is the step under way, if any."""
        tracker = self._rank.transfer.tracker if self._rank is not None else None
        if tracker is not None:
            tracker.fence(tuple(self._loads), CLOSE_S)  # its loads must not overwrite what vLLM recomputes
        return FailedWorker(self, self._loads, self._sizes, tracker, step)


class FailedWorker:
    """Replaces a worker that raised: reports all work as failed, so that vLLM waits for nothing.

    To vLLM it reports as failed all loads without a result and those of later steps; to the scheduler, all jobs that the tracker
    does not report. The index removes the objects that these were to load, prefetch or store, so that hits cease.

    Args:
        failed: the worker that raised.
        unanswered: its loads that vLLM still waits for.
        sizes: tokens per block of each group.
        tracker: the worker's; write-back continues.
        step: the step under way, if its load results are not reported yet.
    """

    def __init__(
        self,
        failed: ConnectorWorker,
        unanswered: Mapping[int, BlockView],
        sizes: Sequence[int],
        tracker: JobTracker | None,
        step: StepMeta | None,
    ) -> None:
        self.metrics = failed.metrics
        self._failed = failed
        self._unanswered = dict(unanswered)
        self._sizes = sizes
        self._tracker = tracker
        self._step: StepMeta | None = None
        if step is not None:
            self.bind_connector_metadata(step)

    def register_kv_caches(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Does nothing."""

    def before_sleep(self, tags: Sequence[str]) -> None:
        """Does nothing: the failed worker's loads were fenced."""

    def after_wake_up(self, tags: Sequence[str] | None) -> None:
        """Does nothing."""

    def offer(self) -> Offer:
        """Returns an offer that disables the cache."""
        return Offer(self._failed.rank, None, disabled="the connector is switched off; see the worker's log")

    def bind_connector_metadata(self, step: StepMeta) -> None:
        """Takes a step, whose loads will be reported as failed."""
        self._step = step
        loads = [job.id for job in step.plan.jobs if job.kind == "load"]
        self._unanswered.update({job: step.views[job] for job in loads if job in step.views})

    def start_load_kv(self) -> None:
        """Does nothing."""

    def wait_for_save(self) -> None:
        """Does nothing."""

    def get_transfer_results(self) -> LoadResults:
        """Returns all loads that vLLM waits for, as failed."""
        found = LoadResults()
        refused = self._step.refused if self._step is not None else ()
        for view in (*refused, *self._unanswered.values()):
            found.add_failed(view, self._sizes)
        self._unanswered = {}
        return found

    def build_connector_worker_meta(self) -> RankMeta | None:
        """Returns the tracker's report, with all other jobs of the step as failed."""
        if self._tracker is None or self._step is None:
            return None
        report = self._tracker.report()
        if report.epoch != self._step.plan.epoch:  # the tracker has not seen the new plan
            report = msgspec.structs.replace(report, epoch=self._step.plan.epoch, jobs=())
        known = {job.job for job in report.jobs}
        failed = [
            JobReport(job.id, (int(Status.FAILED),) * len(job.ops), True, 0, "the worker's connector is switched off")
            for job in self._step.plan.jobs
            if job.id not in known
        ]
        jobs = (*report.jobs, *failed)
        return RankMeta([msgspec.structs.replace(report, jobs=jobs)]) if jobs else None

    def shutdown(self) -> None:
        """Shuts down the worker that failed."""
        self._failed.shutdown()


def slots_of(blocks: list[int], block_tokens: int, tokens: int, skip: int) -> torch.Tensor:
    """Returns the slots of a request's first `tokens` tokens: int64 `(tokens,)`.

    −1 = not resident: the first `skip` tokens, tokens in null blocks, and tokens without a block.
    """
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
