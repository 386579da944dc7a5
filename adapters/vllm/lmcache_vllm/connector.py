"""`LMCacheConnector`: what vLLM loads. It splits into a scheduler half and a worker half and guards both.

Nothing that goes wrong here reaches vLLM: a half that raises is switched off, says so once, and the server goes on uncached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from lmcache.adapter import reason_of, record_failure
from lmcache.config import Config
from lmcache.observe.log import Throttle, info
from lmcache.plan import Plan
from lmcache_vllm import compat
from lmcache_vllm.messages import BlockView, Handshake, Offer, RankMeta, StepMeta
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

T = TypeVar("T")
H = TypeVar("H", ConnectorScheduler, Worker)


class LMCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """A KV cache in DRAM and on disk for vLLM's KV connector interface, version 1."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._throttle = Throttle()
        self._scheduler: ConnectorScheduler | None = None
        self._worker: Worker | None = None
        self._offered: dict[str, int] = {}  # request → tokens that vLLM had itself when it was offered more
        self._unsent: list[BlockView] = []  # loads that vLLM counts on and that no step has carried to the workers
        self._refused: set[str] = set()  # requests that are offered nothing any more: it would be refused again
        self._unanswered: StepMeta | None = None  # the worker's step, until its loads were answered
        self._increments: Increments | None = None
        self._quiet = False
        self._lost_blocks: set[int] = set()
        self._disabled = ""
        compat.join_log()
        extra = dict(self._kv_transfer_config.kv_connector_extra_config)
        strict = extra.get("strict") is True  # holds even where the rest cannot be read
        try:
            config = Config.load(json=extra)
            strict = config.strict
            if warning := compat.check_version():
                self._throttle.warning("untested-version", reason=warning)
            compat.check_config(vllm_config)
            compat.check_groups(kv_cache_config)
            if role == KVConnectorRole.SCHEDULER:
                said = {
                    name: entry["value"] for name, entry in config.describe().items() if entry["source"] != "default"
                }
                info("cache-settings", **said)
                events = vllm_config.kv_events_config
                told = bool(events is not None and events.enable_kv_cache_events)
                self._scheduler = ConnectorScheduler(kv_cache_config, config, events=told)
                self._increments = Increments(self._scheduler.metrics)
            else:
                self._worker = ConnectorWorker(vllm_config, kv_cache_config, config)
                self._increments = Increments(self._worker.metrics)
        except Exception as error:
            if strict:
                raise
            self._disabled = reason_of(error)
            if role == KVConnectorRole.SCHEDULER:  # which also says what workers report
                self._throttle.warning("cache-disabled", reason=self._disabled)

    # ---------------------------------------------------------------- guards

    def _ask(self, half: H | None, call: Callable[[H], T], default: T) -> T:
        """`call(half)`, or `default` where there is none; whatever it raises switches the half off.

        A worker half has a stand-in from then on, for vLLM waits until a load was answered, however long that takes.
        """
        if half is None:
            return default
        try:
            return call(half)
        except Exception as error:
            self._half_failed(half, error)
            return default

    def _half_failed(self, half: ConnectorScheduler | Worker, error: Exception) -> None:
        record_failure(error, "cache-off", self._throttle, half.metrics)
        if self._scheduler is half:
            self._scheduler = None
        elif self._worker is half and isinstance(half, ConnectorWorker):
            self._worker = half.switch_off(self._unanswered)

    # ---------------------------------------------------------------- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See the base class."""
        if self._worker is not None:
            self._worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> Handshake | None:
        """What this worker holds, for the scheduler half; or why it holds nothing."""
        nothing = Offer(
            int(getattr(self._vllm_config.parallel_config, "rank", 0)),
            None,
            disabled=self._disabled or "its worker half failed; its log says how",
        )
        if self._disabled:
            return Handshake.of(nothing)
        half = self._worker
        if half is None:
            return None
        return self._ask(half, lambda half: Handshake.of(half.offer()), Handshake.of(nothing))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """See the base class."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMeta)
        self._quiet = connector_metadata.quiet
        self._unanswered = connector_metadata
        self._ask(self._worker, lambda half: half.bind_connector_metadata(connector_metadata), None)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads, and traffic between tiers."""
        self._ask(self._worker, lambda half: half.start_load_kv(), None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled when its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing: stores follow the forward pass, all layers at once."""

    def wait_for_save(self) -> None:
        """Stores."""
        self._ask(self._worker, lambda half: half.wait_for_save(), None)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Loads that ended."""
        nothing: LoadResults | None = None
        landed = self._ask(self._worker, lambda half: half.get_transfer_results(), nothing)
        if landed is None:  # there is no half, or its stand-in has to answer
            landed = self._ask(self._worker, lambda half: half.get_transfer_results(), LoadResults())
        self._unanswered = None
        several = len(self._kv_cache_config.kv_cache_groups) > 1
        self._lost_blocks = set() if several else landed.blocks
        failed = landed.failed if several else set()
        return compat.TransferResults(finished_recving=landed.requests, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The same for older releases."""
        return None, self.get_transfer_results(finished_req_ids).finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """With one group, failed loads by block; with several, vLLM wants them by request."""
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def build_connector_worker_meta(self) -> RankMeta | None:
        """Reports for the scheduler half."""
        return self._ask(self._worker, lambda half: half.build_connector_worker_meta(), None)

    # ---------------------------------------------------------------- scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache that loses something costs a miss, no request."""
        return False

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """What the workers hold."""
        offers = [found.read() for found in metadata.values() if isinstance(found, Handshake)]
        if offers:
            self._ask(self._scheduler, lambda half: half.open(offers), None)

    def on_new_request(self, request: Request) -> None:
        """Fetch from lower tiers while the request queues."""
        self._ask(self._scheduler, lambda half: half.on_new_request(request), None)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What can be loaded beyond vLLM's own prefix cache; always asynchronously."""
        nothing: int | None = 0
        if request.request_id in self._refused:
            return nothing, False
        found = self._ask(
            self._scheduler, lambda half: half.get_num_new_matched_tokens(request, num_computed_tokens), nothing
        )
        if found:
            self._offered[request.request_id] = num_computed_tokens
        return found, bool(found)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Load into these blocks."""
        ids = blocks.get_block_ids()
        local = self._offered.pop(request.request_id, 0)
        if num_external_tokens:
            self._unsent.append(BlockView(request.request_id, ids, local, local + num_external_tokens))
        self._ask(self._scheduler, lambda half: half.update_state_after_alloc(request, ids, num_external_tokens), None)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """For vLLM's own metrics."""
        nothing: dict[str, int] = {}
        by_tier = self._ask(self._scheduler, lambda half: half.sources(request, num_external_tokens), nothing)
        found: dict[CacheHitSource, int] = {}
        for tier, tokens in by_tier.items():
            source = compat.hit_source(tier)
            found[source] = found.get(source, 0) + tokens
        return found

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMeta:
        """What the workers do in this step. A load that vLLM counts on and the half says nothing of is refused."""
        unsent, self._unsent = self._unsent, []
        meta = self._ask(
            self._scheduler, lambda half: half.build_connector_meta(scheduler_output), StepMeta(Plan(0, (), ()))
        )
        if unsent:
            said = {view.request for view in (*meta.views.values(), *meta.refused)}
            meta.refused.extend(view for view in unsent if view.request not in said)
            self._refused.update(view.request for view in meta.refused)
        self._quiet = meta.quiet
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers say."""
        meta: KVConnectorWorkerMetadata | None = connector_output.kv_connector_worker_meta
        if isinstance(meta, RankMeta):
            self._ask(self._scheduler, lambda half: half.update_connector_output(meta), None)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are never held back: what was worth storing has been stored."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`."""
        self._offered.pop(request.request_id, None)
        self._refused.discard(request.request_id)
        self._ask(self._scheduler, lambda half: half.request_finished(request), None)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Write-behind goes on only while the engine steps."""
        return self._ask(self._scheduler, lambda half: half.has_pending_push_work, False)

    def reset_cache(self) -> bool | None:
        """Empty every tier."""
        return self._ask(self._scheduler, lambda half: half.reset_cache(), None)

    def take_events(self) -> Iterable[Any]:
        """What became usable in DRAM and on disk, and what ceased to be, where vLLM is asked for KV events."""
        events = self._scheduler.events if self._scheduler is not None else None
        return events.take() if events is not None else ()

    # ---------------------------------------------------------------- both

    def shutdown(self) -> None:
        """Finish write-behind, release the tiers."""
        self._ask(self._worker, lambda half: half.shutdown(), None)

    def get_kv_connector_stats(self) -> CacheStats | None:
        """What was counted since the last call."""
        return self._increments.take(self._quiet) if self._increments is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheStats | None:
        """See the base class."""
        return CacheStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """`lmcache_*` series beside vLLM's own."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
