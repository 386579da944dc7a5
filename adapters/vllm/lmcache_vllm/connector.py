"""`LMCacheConnector`, the class that vLLM loads: a scheduler in vLLM's scheduler, a worker in each vLLM worker.

No exception of either reaches vLLM. One that concerns a single request or job costs that request its cache. After one in the
scheduler's handling of a step the index starts anew, with empty DRAM; a worker in whose step one occurs is switched off until a
restart, and so is a scheduler that does not recover. Each is counted and logged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from lmcache.adapter import reason_of, record_failure
from lmcache.config import Config
from lmcache.interrupts import uninterrupted
from lmcache.observe.log import Throttle, info
from lmcache.plan import Plan
from lmcache_vllm import compat, plugin
from lmcache_vllm.messages import BlockView, Handshake, Offer, RankMeta, StepMeta
from lmcache_vllm.names import Loras
from lmcache_vllm.scheduler import ConnectorScheduler
from lmcache_vllm.stats import CacheStats, Increments, PromMetrics
from lmcache_vllm.worker import ConnectorWorker, LoadResults, Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_FAULTS = 4
"""Faults that cost vLLM a load or the index its state, of which the scheduler recovers within `_FAULTS_S` seconds each."""

_FAULTS_S = 600.0

T = TypeVar("T")
Side = TypeVar("Side", ConnectorScheduler, Worker)


class _Budget:
    """At most `limit` events, of which one is forgiven every `every` seconds."""

    def __init__(self, limit: int, every: float) -> None:
        self._limit = limit
        self._every = every
        self._used = 0.0
        self._at = time.monotonic()

    def take(self) -> bool:
        """Counts an event; returns whether it is within the limit."""
        now = time.monotonic()
        self._used = max(0.0, self._used - (now - self._at) / self._every) + 1.0
        self._at = now
        return self._used <= self._limit


class LMCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """A KV cache in DRAM and on disk, for version 1 of vLLM's KV connector interface."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._throttle = Throttle()
        self._scheduler: ConnectorScheduler | None = None
        self._worker: Worker | None = None
        self._offered: dict[str, int] = {}  # request → tokens computed by vLLM itself when a hit was offered
        self._unsent: list[BlockView] = []  # loads that vLLM waits for and no step has sent to the workers
        self._refused: set[str] = set()  # requests without further offers: these would be refused again
        self._unanswered: StepMeta | None = None  # the worker's step, until its load results are reported
        self._increments: Increments | None = None
        self._faults = _Budget(_FAULTS, _FAULTS_S)
        self._epoch = 0  # of the last plan
        self._quiet = False
        self._opening = False  # the scheduler has no offers yet
        self._failed_blocks: set[int] = set()
        self._disabled = ""
        extra = dict(self._kv_transfer_config.kv_connector_extra_config or {})
        strict = extra.get("strict") is True  # applies even if the other settings are invalid
        try:
            compat.join_log()
            config = Config.load(json=extra)
            strict = config.strict
            if warning := compat.check_version():
                self._throttle.warning("untested-version", reason=warning)
            compat.check_config(vllm_config)
            compat.check_groups(kv_cache_config)
            if role == KVConnectorRole.SCHEDULER:
                changed = {
                    name: entry["value"] for name, entry in config.describe().items() if entry["source"] != "default"
                }
                info("cache-settings", **changed)
                events = vllm_config.kv_events_config
                enabled = bool(events is not None and events.enable_kv_cache_events)
                transfer = self._kv_transfer_config
                self._scheduler = ConnectorScheduler(
                    kv_cache_config,
                    config,
                    events=enabled,
                    ranks=vllm_config.parallel_config.tensor_parallel_size,
                    loads=transfer.is_kv_consumer,  # true of kv_both, too
                    stores=transfer.is_kv_producer,
                    recomputes=getattr(transfer, "kv_load_failure_policy", "fail") == "recompute",
                )
                self._increments = Increments(self._scheduler.metrics)
                plugin.watch_engine()
            else:
                if getattr(vllm_config.model_config, "enable_sleep_mode", False):
                    plugin.watch_worker(vllm_config)
                self._worker = ConnectorWorker(vllm_config, kv_cache_config, config)
                self._increments = Increments(self._worker.metrics)
        except Exception as error:
            if strict:
                raise
            self._disabled = reason_of(error)
            if role == KVConnectorRole.SCHEDULER:  # it also logs what the workers report
                self._throttle.warning("cache-disabled", reason=self._disabled)

    # ---------------------------------------------------------------- guards

    @uninterrupted  # an LLM in a notebook goes on after Ctrl-C
    def _call(self, side: Side | None, call: Callable[[Side], T], default: T) -> T:
        """Returns `call(side)`, or `default` if `side` is None or raises.

        After an exception the scheduler starts anew, as long as that is rare. A worker is replaced by a `FailedWorker`, because
        vLLM waits for the result of every load without a timeout.
        """
        if side is None:
            return default
        try:
            return call(side)
        except Exception as error:
            if isinstance(side, ConnectorScheduler):
                self._recover(side, error)
            else:
                self._switch_off(side, error)
            return default

    @uninterrupted
    def _call_for(
        self, request: Request, call: Callable[[ConnectorScheduler], T], default: T, *, lost: bool = False
    ) -> T:
        """Returns `call(scheduler)`, or `default` if there is none or it raises: then that request runs uncached.

        `lost`: an exception costs vLLM a load that it was offered, which may end the request with an error.
        """
        scheduler = self._scheduler
        if scheduler is None:
            return default
        try:
            return call(scheduler)
        except Exception as error:
            if lost and not self._faults.take():
                self._switch_off(scheduler, error)
            else:
                self._call(
                    scheduler, partial(ConnectorScheduler.abandon, request_id=request.request_id, error=error), None
                )
            return default

    def _recover(self, scheduler: ConnectorScheduler, error: Exception) -> None:
        if not self._faults.take():
            self._switch_off(scheduler, error)
            return
        record_failure(error, "cache-restart", self._throttle, scheduler.metrics)
        try:
            scheduler.recover()
        except Exception as again:
            self._switch_off(scheduler, again)

    def _switch_off(self, side: ConnectorScheduler | Worker, error: Exception) -> None:
        record_failure(error, "cache-off", self._throttle, side.metrics)
        if self._scheduler is side:
            self._scheduler = None
        elif self._worker is side and isinstance(side, ConnectorWorker):
            self._worker = side.switch_off(self._unanswered)

    # ---------------------------------------------------------------- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Opens the cache on vLLM's KV tensors."""
        if self._worker is not None:
            self._worker.register_kv_caches(kv_caches)

    def before_sleep(self, tags: Sequence[str]) -> None:
        """Memory of these kinds (`weights`, `kv_cache`) is about to go away: nothing touches KV from here on."""
        self._call(self._worker, lambda worker: worker.before_sleep(tags), None)

    def after_wake_up(self, tags: Sequence[str] | None) -> None:
        """Memory of these kinds, or all, is back. Once all is, the layout is proven anew; if it is not, the cache is off."""
        self._call(self._worker, lambda worker: worker.after_wake_up(tags), None)

    def get_handshake_metadata(self) -> Handshake | None:
        """Returns what this worker has opened, or why it caches nothing.

        None in the scheduler's process, and inside another connector (`MultiConnector`): that passes the metadata of one
        connector to all of them, some of which accept only their own. Then offers travel with the first reports.
        """
        wrapped = has_kv_transfer_group() and get_kv_transfer_group() is not self
        return None if wrapped else self._handshake()

    def _handshake(self) -> Handshake | None:
        nothing = Offer(
            int(getattr(self._vllm_config.parallel_config, "rank", 0)),
            None,
            disabled=self._disabled or "its connector failed; see the worker's log",
        )
        if self._disabled:
            return Handshake.of(nothing)
        worker = self._worker
        if worker is None:
            return None
        return self._call(worker, lambda worker: Handshake.of(worker.offer()), Handshake.of(nothing))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Takes this step's `StepMeta`."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMeta)
        self._quiet = connector_metadata.quiet
        self._opening = connector_metadata.opening
        self._unanswered = connector_metadata
        self._call(self._worker, lambda worker: worker.bind_connector_metadata(connector_metadata), None)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Starts loads and the traffic between tiers."""
        self._call(self._worker, lambda worker: worker.start_load_kv(), None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: a request is scheduled once its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Does nothing: all layers are stored together after the forward pass."""

    def wait_for_save(self) -> None:
        """Stores what the forward pass has computed; on return vLLM may overwrite it."""
        self._call(self._worker, lambda worker: worker.wait_for_save(), None)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Returns the loads that have ended."""
        nothing: LoadResults | None = None
        results = self._call(self._worker, lambda worker: worker.get_transfer_results(), nothing)
        if results is None:  # no worker, or it has just failed: then its `FailedWorker` answers
            results = self._call(self._worker, lambda worker: worker.get_transfer_results(), LoadResults())
        self._unanswered = None
        several = len(self._kv_cache_config.kv_cache_groups) > 1
        self._failed_blocks = set() if several else results.blocks
        failed = results.failed if several else set()
        return compat.TransferResults(finished_recving=results.requests, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Like `get_transfer_results`, for older vLLM releases."""
        return None, self.get_transfer_results(finished_req_ids).finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Returns the blocks of failed loads if there is one KV group; with several, vLLM expects failed requests instead."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def build_connector_worker_meta(self) -> RankMeta | None:
        """Returns this rank's reports for the scheduler; until that has opened, with what this rank offers."""
        meta = self._call(self._worker, lambda worker: worker.build_connector_worker_meta(), None)
        if self._opening and (offer := self._handshake()) is not None:
            meta = meta or RankMeta([])
            meta.offers.append(offer)
        return meta

    # ---------------------------------------------------------------- scheduler

    @property
    def loras(self) -> Loras | None:
        """The adapters that the scheduler has named."""
        return self._scheduler.loras if self._scheduler is not None else None

    @property
    def requires_kv_delivery(self) -> bool:
        """False: what this cache loses is recomputed, no request fails."""
        return False

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Opens the scheduler with what the workers offer."""
        offers = [found.read() for found in metadata.values() if isinstance(found, Handshake)]
        if offers:
            self._call(self._scheduler, lambda scheduler: scheduler.open(offers), None)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """As `set_xfer_handshake_metadata`, by pipeline stage and tensor-parallel rank: vLLM's own refuses a second stage."""
        self.set_xfer_handshake_metadata(dict(enumerate(metadata.values())))

    def on_new_request(self, request: Request) -> None:
        """Prefetches from lower tiers while the request is queued."""
        self._call_for(request, lambda scheduler: scheduler.on_new_request(request), None)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Returns how many tokens can be loaded beyond vLLM's own prefix cache, and whether asynchronously (always).

        None instead of a number: call again in a later step.
        """
        nothing: int | None = 0
        if request.request_id in self._refused:
            return nothing, False
        found = self._call_for(
            request, lambda scheduler: scheduler.get_num_new_matched_tokens(request, num_computed_tokens), nothing
        )
        if found:
            self._offered[request.request_id] = num_computed_tokens
        return found, bool(found)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plans the load into the allocated blocks."""
        ids = blocks.get_block_ids()
        local = self._offered.pop(request.request_id, 0)
        if num_external_tokens:
            self._unsent.append(BlockView(request.request_id, ids, local, local + num_external_tokens))
        self._call_for(
            request,
            lambda scheduler: scheduler.update_state_after_alloc(request, ids, num_external_tokens),
            None,
            lost=num_external_tokens > 0,
        )

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Returns loaded tokens by source, for vLLM's own metrics."""
        nothing: dict[str, int] = {}
        by_tier = self._call_for(request, lambda scheduler: scheduler.sources(request, num_external_tokens), nothing)
        found: dict[CacheHitSource, int] = {}
        for tier, tokens in by_tier.items():
            source = compat.hit_source(tier)
            found[source] = found.get(source, 0) + tokens
        return found

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMeta:
        """Returns what the workers do in this step. Refuses loads that vLLM waits for and the scheduler did not plan."""
        unsent, self._unsent = self._unsent, []
        meta = self._call(
            self._scheduler,
            lambda scheduler: scheduler.build_connector_meta(scheduler_output),
            StepMeta(Plan(self._epoch, (), ())),
        )
        self._epoch = meta.plan.epoch
        if unsent:
            sent = {view.request for view in (*meta.views.values(), *meta.refused)}
            meta.refused.extend(view for view in unsent if view.request not in sent)
            self._refused.update(view.request for view in meta.refused)
        self._quiet = meta.quiet
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Applies the workers' reports."""
        meta: KVConnectorWorkerMetadata | None = connector_output.kv_connector_worker_meta
        if isinstance(meta, RankMeta):
            self._call(self._scheduler, lambda scheduler: scheduler.update_connector_output(meta), None)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forgets the request. Never delays freeing its blocks: they have been stored already."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`."""
        self._offered.pop(request.request_id, None)
        self._refused.discard(request.request_id)
        self._call_for(request, lambda scheduler: scheduler.request_finished(request), None)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Returns whether work remains that continues only while the engine steps, such as write-back."""
        return self._call(self._scheduler, lambda scheduler: scheduler.has_pending_push_work, False)

    def reset_cache(self) -> bool | None:
        """Empties DRAM and renames what is computed from now on; tiers keep what they have."""
        return self._call(self._scheduler, lambda scheduler: scheduler.reset_cache(), None)

    def take_events(self) -> Iterable[Any]:
        """Returns which blocks were added to and removed from DRAM and disk, if KV events are enabled in vLLM."""
        events = self._scheduler.events if self._scheduler is not None else None
        return events.take() if events is not None else ()

    # ---------------------------------------------------------------- both

    def shutdown(self) -> None:
        """Finishes write-back and releases the tiers."""
        self._call(self._worker, lambda worker: worker.shutdown(), None)

    def get_kv_connector_stats(self) -> CacheStats | None:
        """Returns what was counted since the last call."""
        return self._increments.stats(self._quiet) if self._increments is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheStats | None:
        """Wraps counter increments."""
        return CacheStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """Creates the `lmcache_*` series next to vLLM's own."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
