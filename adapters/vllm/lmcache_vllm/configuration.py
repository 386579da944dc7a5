"""From vLLM's resolved configuration to names: what a model computes (meaning), and how it is rounded (numerics).

Everything counts but `NEUTRAL`, a reviewed list of what changes no KV or is named in another way; a field of a later vLLM
separates until it has been reviewed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmcache.numerics import depends_on_length, meaning_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_API = "options of the API server"
_BATCH = "how requests are batched: names contain no batch composition"
_MEMORY = "how much memory is used"
_FINDS = "how vLLM finds its own KV"
_REPLICAS = "replicas compute alike"
_WHERE = "where something lies or is reached"
_PRINTS = "logs, metrics and profiles"
_RUNTIME = "filled while the engine runs"
_SAMPLING = "how tokens are chosen, after KV is computed"
_MEANING = "part of the meaning"
_NAMED = "weights and images are named by their content"

NEUTRAL: Mapping[str, Mapping[str, str]] = {
    "VllmConfig": {
        "scheduler_config": _BATCH,
        "observability_config": _PRINTS,
        "logging_config": _PRINTS,
        "profiler_config": _PRINTS,
        "structured_outputs_config": _SAMPLING,
        "reasoning_config": _SAMPLING,
        "watermark_config": _SAMPLING,
        "kv_transfer_config": "how KV is kept, not what it is",
        "kv_events_config": "who learns of KV",
        "ec_transfer_config": "where encoder outputs are kept",
        "ec_manager_config": "where encoder outputs are kept",
        "aux_output_config": "what else is returned",
        "weight_transfer_config": "a transfer of weights resets the cache",
        "instance_id": "random",
        "shutdown_timeout": _API,
    },
    "ModelConfig": {
        **dict.fromkeys(("model", "model_weights", "revision", "hf_token"), _NAMED),
        **dict.fromkeys(("hf_config", "hf_text_config", "hf_overrides", "hf_config_path", "config_format"), _MEANING),
        **dict.fromkeys(
            ("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), "names hold token ids"
        ),
        **dict.fromkeys(
            ("served_model_name", "enable_prompt_embeds", "io_processor_plugin", "renderer_num_workers"), _API
        ),
        **dict.fromkeys(("allowed_local_media_path", "allowed_media_domains"), _API),
        **dict.fromkeys(
            ("max_model_len", "spec_target_max_model_len"),
            "a limit; part of the meaning where rope depends on it",
        ),
        **dict.fromkeys(("max_logprobs", "logprobs_mode", "return_sampling_mask", "use_fp64_gumbel"), _SAMPLING),
        **dict.fromkeys(
            ("generation_config", "override_generation_config", "logits_processors", "pooler_config"), _SAMPLING
        ),
        **dict.fromkeys(("seed",), "sampling; random weights have no identity"),
        **dict.fromkeys(("enable_sleep_mode", "sleep_preserve_parameter_names", "sleep_mode_backend"), _MEMORY),
        **dict.fromkeys(
            ("sleep_mode_offload_cudagraph", "enable_nccl_comm_suspend", "enable_cumem_allocator"), _MEMORY
        ),
    },
    "MultiModalConfig": {
        **dict.fromkeys(("limit_per_prompt", "enable_mm_embeds", "interleave_mm_strings"), _API),
        **dict.fromkeys(("media_io_kwargs", "mm_processor_kwargs"), "images are named by their processed bytes"),
        **dict.fromkeys(
            ("mm_processor_cache_gb", "mm_processor_cache_type", "mm_shm_cache_max_object_size_mb"), _MEMORY
        ),
        **dict.fromkeys(("skip_mm_profiling", "mm_ipc_gpu_memory_gb"), _MEMORY),
    },
    "CacheConfig": {
        **dict.fromkeys(
            ("gpu_memory_utilization", "num_gpu_blocks_override", "num_gpu_blocks", "num_cpu_blocks"), _MEMORY
        ),
        **dict.fromkeys(("kv_cache_memory_bytes", "kv_cache_size_tokens", "kv_cache_max_concurrency"), _MEMORY),
        **dict.fromkeys(("kv_offloading_size", "kv_offloading_backend"), _MEMORY),
        **dict.fromkeys(("enable_prefix_caching", "prefix_caching_hash_algo", "prefix_match_unit"), _FINDS),
        **dict.fromkeys(
            ("prefix_cache_retention_interval", "hash_block_size", "cache_hit_alignment_tokens"),
            _FINDS,
        ),
        **dict.fromkeys(("user_specified_block_size", "_block_size_resolved"), "who chose the size of a block"),
    },
    "ParallelConfig": {
        **dict.fromkeys(("data_parallel_master_ip", "data_parallel_rpc_port", "data_parallel_master_port"), _WHERE),
        **dict.fromkeys(("_data_parallel_master_port_list", "_coord_store_port", "master_addr", "master_port"), _WHERE),
        **dict.fromkeys(("node_rank", "nnodes", "rank", "assigned_physical_gpu_ids", "placement_group"), _WHERE),
        **dict.fromkeys(("numa_bind", "numa_bind_nodes", "numa_bind_cpus", "ray_runtime_env"), _WHERE),
        **dict.fromkeys(("data_parallel_rank", "data_parallel_rank_local", "data_parallel_index"), _REPLICAS),
        **dict.fromkeys(("disable_nccl_for_dp_synchronization",), "how replicas agree on a step"),
        **dict.fromkeys(
            ("data_parallel_size_local", "data_parallel_external_lb", "data_parallel_hybrid_lb"),
            _REPLICAS,
        ),
        **dict.fromkeys(
            ("distributed_executor_backend", "distributed_timeout_seconds", "cpu_distributed_timeout_seconds"), _API
        ),
        **dict.fromkeys(("_api_process_count", "_api_process_rank", "max_parallel_loading_workers"), _API),
        **dict.fromkeys(("enable_fault_tolerance", "fault_tolerance_config", "ray_workers_use_nsight"), _API),
    },
    "LoadConfig": {
        **dict.fromkeys(("download_dir", "use_tqdm_on_load", "device", "pt_load_map_location"), _WHERE),
        **dict.fromkeys(
            ("safetensors_load_strategy", "safetensors_prefetch_num_threads", "safetensors_prefetch_block_size"), _WHERE
        ),
    },
    "LoRAConfig": {"max_cpu_loras": _MEMORY},
    "CompilationConfig": {
        **dict.fromkeys(("debug_dump_path", "cache_dir", "local_cache_dir", "compile_cache_save_format"), _WHERE),
        **dict.fromkeys(("enabled_custom_ops", "disabled_custom_ops", "traced_files", "compilation_time"), _RUNTIME),
        **dict.fromkeys(("encoder_compilation_time", "static_forward_context", "static_all_moe_layers"), _RUNTIME),
        **dict.fromkeys(("cudagraph_capture_sizes", "max_cudagraph_capture_size", "compile_ranges_endpoints"), _BATCH),
        **dict.fromkeys(("cudagraph_num_of_warmups", "bs_to_padded_graph_size"), _BATCH),
    },
}
"""Fields that `rounding` leaves out, by class, each with the reason: they change no KV, or are named in another way. Every other
field separates."""

NEUTRAL_ENVIRONMENT: Mapping[str, str] = {
    **dict.fromkeys(("*_HOST", "*_PORT", "*_IP", "VLLM_LORA_RESOLVER_*"), _WHERE),
    **dict.fromkeys(("*_TIMEOUT", "*_TIMEOUT_S", "*_TIMEOUT_SECONDS"), "how long to wait"),
    **dict.fromkeys(("VLLM_LOG*", "VLLM_CONFIGURE_LOGGING", "VLLM_DISABLE_LOG_LOGO", "VLLM_USAGE_SOURCE"), _PRINTS),
    **dict.fromkeys(("VLLM_PROCESS_NAME_PREFIX", "VLLM_GC_DEBUG", "VLLM_DEBUG_*", "*_FOR_PROFILING"), _PRINTS),
    **dict.fromkeys(("VLLM_MAX_N_*", "VLLM_MAX_COMPLETION_*", "VLLM_MAX_STOP_*", "VLLM_MAX_*BAD_WORDS*"), _API),
    **dict.fromkeys(("VLLM_MAX_MEDIA_*", "VLLM_ENABLE_RESPONSES_*", "VLLM_ENABLE_COHERE_API", "VLLM_GPT_OSS_*"), _API),
    **dict.fromkeys(
        ("VLLM_TOOL_*", "VLLM_ENFORCE_STRICT_TOOL_CALLING", "VLLM_SYSTEM_START_DATE", "VLLM_USE_FASTOKENS"), _API
    ),
    **dict.fromkeys(("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_USE_RUST_*"), _API),
    **dict.fromkeys(("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"), _API),
    **dict.fromkeys(("VLLM_XGRAMMAR_*", "VLLM_V1_USE_OUTLINES_CACHE"), _SAMPLING),
    **dict.fromkeys(("VLLM_DP_*", "RAY_*", "VLLM_RAY_*", "VLLM_USE_RAY_*"), _REPLICAS),
    **dict.fromkeys(("VLLM_NIXL_*", "VLLM_MOONCAKE_*", "MOONCAKE_*", "VLLM_P2P_*", "VLLM_EC_*"), "other connectors"),
    **dict.fromkeys(
        ("VLLM_KV_EVENTS_*", "VLLM_KV_OFFLOAD_*", "VLLM_USE_SIMPLE_KV_OFFLOAD"), "who keeps KV or learns of it"
    ),
    **dict.fromkeys(("VLLM_MQ_*", "VLLM_MSGPACK_*", "VLLM_FASTSAFETENSORS_*"), "how messages and files are read"),
    **dict.fromkeys(("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"), "the number of threads is named"),
    **dict.fromkeys(
        ("VLLM_IMAGE_TAG", "VLLM_BUILD_URL", "VLLM_BUILD_PIPELINE", "VLLM_DOCKER_*"), "how it was packaged"
    ),
}
"""vLLM's environment variables that `rounding` leaves out, as patterns, each with the reason. Every other one that vLLM counts
among the factors of compilation separates."""


def meaning(config: VllmConfig, scales: str) -> str:
    """Returns the digest of what the model computes besides its weights.

    Without fixed KV scales and unusual options it equals what Hugging Face's adapter says about the same model.

    Args:
        config: vLLM's.
        scales: digest of fixed KV scales, or empty.
    """
    model = config.model_config
    resolved = model.hf_config.to_dict()
    attention = getattr(config, "attention_config", None)
    more: dict[str, Any] = {
        "kv_scales": scales or None,
        "max_model_len": int(model.max_model_len) if depends_on_length(resolved) else None,
        "disable_sliding_window": getattr(model, "disable_sliding_window", False) or None,
        "model_class_overrides": plain(getattr(model, "model_class_overrides", None)) or None,
        "convert": None if getattr(model, "convert", "auto") in ("auto", "none") else str(model.convert),
        "non_causal": getattr(attention, "use_non_causal", False) or None,
    }
    return meaning_of(resolved, **more)


def rounding(config: VllmConfig) -> str:
    """Returns the digest of everything else in vLLM's configuration and environment that may decide bits."""
    found = plain(config)
    if not getattr(config.model_config, "is_moe", True):
        for name in _EXPERTS:
            found["parallel_config"].pop(name, None)
    return meaning_of({"config": found, "environment": _environment()}, neutral={})


_EXPERTS = ("data_parallel_size", "elastic_ep_max_dp_size")
"""How many replicas there are: it counts where experts are spread over them."""


def _environment() -> dict[str, str]:
    import vllm.envs

    factors = vllm.envs.compile_factors()
    return {
        name: str(value)
        for name, value in factors.items()
        if not any(fnmatchcase(name, pattern) for pattern in NEUTRAL_ENVIRONMENT)
    }


def plain(value: Any, depth: int = 0) -> Any:
    """Converts a configuration to plain values without its neutral fields, independent of addresses in memory."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        neutral = NEUTRAL.get(type(value).__name__, {})
        found = {
            f.name: plain(getattr(value, f.name, None), depth)
            for f in dataclasses.fields(value)
            if f.name not in neutral
        }
        return {"class": type(value).__name__, **found}
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Mapping):
        return {str(key): plain(inner, depth) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, depth) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(plain(inner, depth)) for inner in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    name = getattr(value, "__qualname__", None)
    if name is not None:  # classes and functions
        return f"{getattr(value, '__module__', '')}.{name}"
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        return plain(to_dict(), depth + 1)
    text = repr(value)
    if " at 0x" in text and depth < _DEPTH:  # an address says nothing in another process
        return {"class": type(value).__qualname__, **{k: plain(v, depth + 1) for k, v in sorted(vars(value).items())}}
    return text


_DEPTH = 4
