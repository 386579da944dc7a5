"""Everything that depends on the vLLM release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vllm

from lmcache import adapter
from lmcache.adapter import UnsupportedError as UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

TESTED = ("0.28", "0.32")
"""Release series that the adapter is tested with."""

OLDEST = (0, 28)
"""First supported release; before it, the connector interface lacks the layouts and the handshake used here."""


def check_version() -> str:
    """Returns a warning if this release is untested, else an empty string.

    Raises:
        UnsupportedError: this release is known not to work.
    """
    return adapter.check_version("vLLM", str(vllm.__version__), tested=TESTED, oldest=OLDEST, component="connector")


def join_log() -> None:
    """Sends the cache's log lines to vLLM's log."""
    adapter.join_log("vllm")


try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults as _Results
except ImportError:  # 0.28: `get_finished` returns two sets, and failed loads are reported by block only

    @dataclass
    class _Results:  # type: ignore[no-redef]
        """Stands in for the class of newer releases."""

        finished_sending: set[str] = field(default_factory=set)
        finished_recving: set[str] = field(default_factory=set)
        failed_recving: set[str] = field(default_factory=set)


TransferResults: Any = _Results
"""Results of loads, by request."""

SEVERAL_GROUPS = TransferResults.__module__ != __name__
"""Whether this release supports connectors with several KV groups: failed loads by request, and block tables per group."""


def hit_source(tier: str) -> Any:
    """Returns the label of a tier in vLLM's own metrics; None if this release has none."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return {"dram": CacheHitSource.HOST, "disk": CacheHitSource.DISK}.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)


def check_groups(kv_config: KVCacheConfig) -> None:
    """Checks that there is KV, and that this release supports the number of its groups.

    Raises:
        UnsupportedError: no group, or several where the release supports one.
    """
    groups = len(kv_config.kv_cache_groups)
    if not groups:
        raise UnsupportedError("this model keeps no KV")
    if groups > 1 and not SEVERAL_GROUPS:
        raise UnsupportedError(
            f"this model has {groups} KV cache groups; with vLLM {vllm.__version__} the connector serves models with one"
        )


def check_config(config: VllmConfig) -> None:
    """Refuses what can be seen from the configuration to be uncacheable: a hit could differ from what would be computed, or
    vLLM could not go on from it.

    Raises:
        UnsupportedError: the message names the option.
    """
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedError("pipeline parallelism is not supported yet: run with --pipeline-parallel-size 1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(f"context parallelism ({name}) spreads a token's KV over ranks: not supported")
    if getattr(cache, "calculate_kv_scales", False):
        raise UnsupportedError("calculate_kv_scales makes scales depend on the first request: give fixed ones")
    if model.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models are not supported")
    if getattr(model, "is_diffusion", False):
        raise UnsupportedError("a diffusion model's KV depends on later tokens")
    if getattr(config, "is_mm_encoder_only", False):
        raise UnsupportedError("this instance runs an encoder only and keeps no KV")
    if getattr(model, "runner_type", "generate") == "pooling" and not (
        getattr(model, "is_prefix_caching_supported", True) and cache.enable_prefix_caching
    ):
        raise UnsupportedError("this pooling model runs without prefix caching: it needs all of a prompt in one pass")
    if getattr(config, _FORCED_OFF, False):
        raise UnsupportedError("vLLM has switched prefix caching off for this model or platform")
    drafter = getattr(config, "speculative_config", None)
    if drafter is not None and drafter.method not in _DRAFTS_WITHOUT_KV:
        raise UnsupportedError(
            f"speculative decoding by {drafter.method!r} keeps KV of its own, which names do not cover"
        )


_DRAFTS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""Ways of drafting tokens that read no KV but the model's."""

_FORCED_OFF = "_lmcache_prefix_caching_forced_off"
"""Attribute of a configuration whose prefix caching vLLM itself has switched off."""


def mark_forced_off(config: VllmConfig) -> None:
    """Notes that vLLM itself has switched prefix caching off; `check_config` refuses that, also in other processes."""
    object.__setattr__(config, _FORCED_OFF, True)


_NO_PREFIX = {
    "CPUMLAImpl": "vLLM's reference MLA for CPUs ignores what was computed before; with AMX it can go on from a prefix"
}
"""Attention implementations whose forward pass cannot continue from existing KV, and why."""


def check_layers(layers: Mapping[str, Any]) -> None:
    """Refuses attention backends for which no hit can be correct.

    Raises:
        UnsupportedError: the message names the backend.
    """
    for layer in layers.values():
        name = type(getattr(layer, "impl", None)).__name__
        if name in _NO_PREFIX:
            raise UnsupportedError(f"{name}: {_NO_PREFIX[name]}")


class BlockTables:
    """Block tables of the scheduled requests, per group.

    Newer releases return a request's table, with null blocks before a sliding window. Older ones only report the blocks added in
    a step, which suffices for one group of full attention.
    """

    def __init__(self) -> None:
        self._resolve: Any = None
        self._tables: dict[str, tuple[list[int], ...]] = {}

    def update(self, output: SchedulerOutput) -> None:
        """Takes the changes of a step."""
        state: Any = getattr(output, "kv_connector_block_state", None)
        self._resolve = None if state is None else state.resolve_block_ids
        if self._resolve is not None:
            return
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = tuple(list(ids) for ids in new.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, added in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if added is None:
                continue
            if request_id in cached.resumed_req_ids or request_id not in self._tables:
                self._tables[request_id] = tuple(list(ids) for ids in added)
            else:
                for table, ids in zip(self._tables[request_id], added, strict=True):
                    table.extend(ids)

    def of(self, request_id: str) -> tuple[list[int], ...] | None:
        """Returns a scheduled request's block ids per group, from its first token on."""
        if self._resolve is not None:
            found: tuple[list[int], ...] = self._resolve(request_id)
            return found
        table = self._tables.get(request_id)
        return None if table is None else tuple(list(ids) for ids in table)

    def forget(self, request_id: str) -> None:
        """Removes a finished request."""
        self._tables.pop(request_id, None)


def worker_rank() -> tuple[int, int]:
    """Returns this worker's rank in its tensor-parallel group, and the group's size."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_rank()), int(get_tensor_model_parallel_world_size())


def attention_layers(config: VllmConfig) -> dict[str, Any]:
    """Returns layer name → attention module; works in a worker process only."""
    return dict(config.compilation_config.static_forward_context)
