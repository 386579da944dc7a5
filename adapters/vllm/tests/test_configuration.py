"""vLLM's configuration in names: every field separates but a reviewed list; nothing depends on the process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from lmcache_conformance.labs.models import model_folder
from lmcache_vllm import configuration


def engine_config(**changes: Any) -> Any:
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "skip_tokenizer_init": True}
    return EngineArgs(model=str(model_folder("llama")), **{**arguments, **changes}).create_engine_config()


@pytest.fixture(scope="module")
def config() -> Any:
    return engine_config()


def parts(config: Any) -> list[tuple[Any, str]]:
    """Every field of the configuration and of those inside it."""
    found = [(config, f.name) for f in dataclasses.fields(config)]
    for inner in [getattr(config, f.name) for f in dataclasses.fields(config)]:
        if dataclasses.is_dataclass(inner):
            found += [(inner, f.name) for f in dataclasses.fields(inner)]
    return found


def test_every_field_separates_but_the_reviewed_ones(config: Any) -> None:
    before, separated, equal = configuration.plain(config), 0, 0
    for owner, name in parts(config):
        neutral = name in configuration.NEUTRAL.get(type(owner).__name__, {})
        inside = any(owner is getattr(config, n, None) for n in configuration.NEUTRAL["VllmConfig"])
        old = getattr(owner, name, None)
        object.__setattr__(owner, name, "something else")
        try:
            differs = configuration.plain(config) != before
        finally:
            object.__setattr__(owner, name, old)
        assert differs != (neutral or inside), f"{type(owner).__name__}.{name}"
        separated += differs
        equal += not differs
    print(f"fields: {equal} equal, {separated} separate, 0 wrong")
    assert separated > 100
    assert all(reason for fields in configuration.NEUTRAL.values() for reason in fields.values())


EVERYDAY: dict[str, Any] = {
    "max_num_seqs": 3,
    "max_num_batched_tokens": 1024,
    "max_model_len": 256,
    "max_num_partial_prefills": 1,
    "long_prefill_token_threshold": 64,
    "enable_chunked_prefill": True,
    "async_scheduling": False,
    "scheduling_policy": "priority",
    "gpu_memory_utilization": 0.5,
    "kv_cache_memory_bytes": 1 << 28,
    "num_gpu_blocks_override": 50,
    "enable_prefix_caching": False,
    "prefix_caching_hash_algo": "sha256_cbor",
    "seed": 7,
    "served_model_name": "another",
    "tokenizer_mode": "slow",
    "max_logprobs": 5,
    "logprobs_mode": "raw_logits",
    "generation_config": "vllm",
    "override_generation_config": {"temperature": 0.1},
    "allowed_local_media_path": "/tmp",
    "enable_prompt_embeds": True,
    "disable_log_stats": True,
    "show_hidden_metrics_for_version": "0.31.0",
    "cudagraph_metrics": True,
    "download_dir": "/tmp",
    "use_tqdm_on_load": False,
    "max_parallel_loading_workers": 2,
    "max_cpu_loras": None,
    "distributed_timeout_seconds": 60,
    "shutdown_timeout": 30,
    "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
    "structured_outputs_config": {"backend": "guidance"},
    "_api_process_count": 2,
    "data_parallel_address": "10.0.0.1",
    "data_parallel_size": 2,
}
"""Arguments that people change between two starts, and none of which changes KV."""

OTHER_KV: dict[str, Any] = {
    "dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "block_size": 64,
    "tensor_parallel_size": 2,
    "hf_overrides": {"rms_norm_eps": 1e-3},
    "disable_sliding_window": True,
    "model_impl": "transformers",
    "enforce_eager": False,
}

EVERYDAY_ENVIRONMENT = {
    "VLLM_PORT": "5001",
    "VLLM_HOST_IP": "10.0.0.1",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_LOG_STATS_INTERVAL": "3",
    "VLLM_ENGINE_READY_TIMEOUT_S": "900",
    "VLLM_MAX_N_SEQUENCES": "8",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "5603",
    "VLLM_CPU_OMP_THREADS_BIND": "0-3",
    "VLLM_CPU_KVCACHE_SPACE": "7",
    "VLLM_API_KEY": "secret",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_PROCESS_NAME_PREFIX": "blue",
    "VLLM_CACHE_ROOT": "/tmp/elsewhere",
}


def names(config: Any) -> tuple[str, str]:
    return configuration.meaning(config, ""), configuration.rounding(config)


def test_arguments_that_people_change_every_day_change_no_name_and_others_do(config: Any) -> None:
    before = names(config)
    known = {f.name for f in dataclasses.fields(EngineArgs)}
    changed = [
        name for name, value in EVERYDAY.items() if name in known and names(engine_config(**{name: value})) != before
    ]
    kept = [name for name, value in OTHER_KV.items() if names(engine_config(**{name: value})) == before]
    print(f"arguments: {len(known & set(EVERYDAY))} equal, {len(OTHER_KV)} separate; wrong: {changed + kept}")
    assert changed == []
    assert kept == []


def test_environments_that_people_change_every_day_change_no_name(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = configuration.rounding(config)
    for name, value in EVERYDAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert configuration.rounding(config) == before
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert configuration.rounding(config) != before


def test_meaning_follows_overrides_and_fixed_scales(config: Any) -> None:
    before = configuration.meaning(config, "")
    assert configuration.meaning(config, "scales") != before
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    assert configuration.meaning(engine_config(hf_overrides=rope), "") != before
    assert configuration.meaning(engine_config(max_model_len=256, max_num_seqs=3, seed=7), "") == before
    config.model_config.hf_config.rope_parameters["rope_type"] = "longrope"
    try:
        longest = configuration.meaning(config, "")
        config.model_config.max_model_len = 256
        assert configuration.meaning(config, "") != longest
    finally:
        config.model_config.hf_config.rope_parameters["rope_type"] = "default"
        config.model_config.max_model_len = 512


def test_limits_do_not_separate_and_processes_agree(config: Any) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_configuration import configuration, engine_config\n"
        "print(configuration.rounding(engine_config(max_num_seqs=3, gpu_memory_utilization=0.5, max_model_len=256)))"
    )
    folder = __file__.rpartition("/")[0]
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == configuration.rounding(config)
