"""Everything that differs between vLLM releases, in one place. The rest of the adapter asks here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vllm

from lmcache.log import LOGGER

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

TESTED = ("0.32",)
"""Releases that this adapter's tests run with."""

OLDEST = (0, 28)
"""Before it, the connector interface has no layouts and no handshake of the kind used here."""


class UnsupportedError(Exception):
    """This vLLM, or this way of running it, cannot be cached; the message says why."""


def check_version() -> str:
    """A sentence to warn with if this release was never tested, or empty.

    Raises:
        UnsupportedError: it is known not to work.
    """
    version = str(vllm.__version__)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST:
        raise UnsupportedError(f"vLLM {version} is too old; the connector needs {'.'.join(map(str, OLDEST))} or newer")
    if ".".join(map(str, numbers)) in TESTED:
        return ""
    return (
        f"vLLM {version} was never tested with this connector, only {', '.join(TESTED)}; the layout proof still holds"
    )


def join_log() -> None:
    """Say things where vLLM says its own, at its level; unless the application has decided where our lines go."""
    theirs = logging.getLogger("vllm")
    if LOGGER.handlers or LOGGER.level or logging.getLogger().handlers or not theirs.isEnabledFor(logging.INFO):
        return
    LOGGER.setLevel(theirs.level)
    LOGGER.propagate = theirs.propagate
    for handler in theirs.handlers:
        LOGGER.addHandler(handler)


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


def block_ids(output: SchedulerOutput, request_id: str) -> tuple[list[int], ...] | None:
    """A scheduled request's block ids per group as they are now, with vLLM's null block where a window has moved on."""
    state: Any = getattr(output, "kv_connector_block_state", None)
    if state is None:
        return None
    found: tuple[list[int], ...] = state.resolve_block_ids(request_id)
    return found


def worker_rank() -> tuple[int, int]:
    """This worker's rank in its tensor-parallel group, and that group's size."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_rank()), int(get_tensor_model_parallel_world_size())


def attention_layers(config: VllmConfig) -> dict[str, Any]:
    """Layer name → attention module, in the worker that runs them."""
    return dict(config.compilation_config.static_forward_context)
