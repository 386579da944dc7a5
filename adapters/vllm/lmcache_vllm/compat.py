"""Everything that differs between vLLM releases, in one place. The rest of the adapter asks here."""

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
"""Releases that this adapter's tests run with."""

OLDEST = (0, 28)
"""Before it, the connector interface has no layouts and no handshake of the kind used here."""


def check_version() -> str:
    """Returns a warning if this release is untested, else an empty string.

    Raises:
        UnsupportedError: this release is known not to work.
    """
    return adapter.check_version("vLLM", str(vllm.__version__), tested=TESTED, oldest=OLDEST, component="connector")


def join_log() -> None:
    """Sends the cache's log lines where vLLM's go."""
    adapter.join_log("vllm")


try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults as _Results
except ImportError:  # 0.28: `get_finished` gives two sets, and failed loads are told by block alone

    @dataclass
    class _Results:  # type: ignore[no-redef]
        """What newer releases have."""

        finished_sending: set[str] = field(default_factory=set)
        finished_recving: set[str] = field(default_factory=set)
        failed_recving: set[str] = field(default_factory=set)


TransferResults: Any = _Results
"""How loads ended, by request."""

SEVERAL_GROUPS = TransferResults.__module__ != __name__
"""Whether this release can be told of failed loads, and of block tables, where there are several KV groups."""


def hit_source(tier: str) -> Any:
    """A tier in the words of vLLM's own metrics; None where this release has none."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return {"dram": CacheHitSource.HOST, "disk": CacheHitSource.DISK}.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)


def check_groups(kv_config: KVCacheConfig) -> None:
    """Refuse several KV groups where this release cannot say what is needed.

    Raises:
        UnsupportedError: with the number of groups.
    """
    groups = len(kv_config.kv_cache_groups)
    if groups > 1 and not SEVERAL_GROUPS:
        raise UnsupportedError(
            f"this model has {groups} KV cache groups; with vLLM {vllm.__version__} the connector serves models with one"
        )


def check_config(config: VllmConfig) -> None:
    """Refuse what would make a hit something else than what was computed.

    Raises:
        UnsupportedError: naming the option.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedError("pipeline parallelism is not supported yet: run with --pipeline-parallel-size 1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(f"context parallelism ({name}) spreads a token's KV over ranks: not supported")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedError("calculate_kv_scales makes scales depend on the first request: give fixed ones")
    if config.model_config.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models are not supported")


_NO_PREFIX = {
    "CPUMLAImpl": "vLLM's reference MLA for CPUs ignores what was computed before; with AMX it can go on from a prefix"
}
"""Attention implementations whose forward pass cannot continue from KV that is there already."""


def check_layers(layers: Mapping[str, Any]) -> None:
    """Refuse backends for which no hit can be right.

    Raises:
        UnsupportedError: naming the backend.
    """
    for layer in layers.values():
        name = type(getattr(layer, "impl", None)).__name__
        if name in _NO_PREFIX:
            raise UnsupportedError(f"{name}: {_NO_PREFIX[name]}")


class BlockTables:
    """Requests' block ids per group, as they are in a step.

    Newer releases can be asked, and answer with the null block where a sliding window has moved on. Older ones only say what
    was added to a request's table, which is all there is to know with one group of full attention.
    """

    def __init__(self) -> None:
        self._ask: Any = None
        self._tables: dict[str, tuple[list[int], ...]] = {}

    def update(self, output: SchedulerOutput) -> None:
        """A step begins."""
        state: Any = getattr(output, "kv_connector_block_state", None)
        self._ask = None if state is None else state.resolve_block_ids
        if self._ask is not None:
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
        """A scheduled request's blocks, from its first token on."""
        if self._ask is not None:
            found: tuple[list[int], ...] = self._ask(request_id)
            return found
        table = self._tables.get(request_id)
        return None if table is None else tuple(list(ids) for ids in table)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._tables.pop(request_id, None)


def worker_rank() -> tuple[int, int]:
    """This worker's rank in its tensor-parallel group, and that group's size."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_rank()), int(get_tensor_model_parallel_world_size())


def attention_layers(config: VllmConfig) -> dict[str, Any]:
    """Layer name → attention module, in the worker that runs them."""
    return dict(config.compilation_config.static_forward_context)
