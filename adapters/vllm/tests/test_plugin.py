"""Configurations that cannot be cached start without the connector, with one line; with `strict` they are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from lmcache_conformance.labs.models import COMMON, model_folder
from lmcache_vllm.compat import UnsupportedError

WHISPER = {
    **COMMON,
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_target_positions": 512,
}

UNCACHED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline stages": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "an encoder and a decoder": ({"model": "whisper"}, "encoder-decoder models"),
    "pooling over all tokens": (
        {"runner": "pooling", "pooler_config": {"seq_pooling_type": "MEAN"}},
        "runs without prefix caching",
    ),
    "pooling over all tokens, against vLLM's advice": (
        {"runner": "pooling", "pooler_config": {"seq_pooling_type": "MEAN"}, "enable_prefix_caching": True},
        "runs without prefix caching",
    ),
    "pooling without prefix caching": (
        {"runner": "pooling", "enable_prefix_caching": False},
        "runs without prefix caching",
    ),
    "a draft model": (
        {"speculative_config": {"method": "draft_model", "model": "llama", "num_speculative_tokens": 2}},
        "speculative decoding by 'draft_model'",
    ),
}

CACHED: dict[str, dict[str, Any]] = {
    "a plain model": {},
    "no prefix cache of vLLM's own": {"enable_prefix_caching": False},
    "pooling of the last token": {"runner": "pooling"},
    "drafts from the prompt": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
}


@pytest.fixture
def resolve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """Returns a function that resolves a configuration with the connector; yields it and the warnings."""
    caplog.set_level(logging.WARNING, "lmcache")
    (tmp_path / "config.json").write_text(json.dumps(WHISPER))
    folders = {"llama": str(model_folder("llama")), "whisper": str(tmp_path)}

    def resolved(options: dict[str, Any], cache: dict[str, Any]) -> tuple[Any, list[str]]:
        given = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "skip_tokenizer_init": True,
            **options,
        }
        given["model"] = folders[given.get("model", "llama")]
        if "model" in given.get("speculative_config", {}):
            given["speculative_config"] = {**given["speculative_config"], "model": folders["llama"]}
        transfer = KVTransferConfig(kv_connector="LMCacheConnector", kv_role="kv_both", kv_connector_extra_config=cache)
        config = EngineArgs(**given, kv_transfer_config=transfer).create_engine_config()
        return config, [r.getMessage() for r in caplog.records if r.name == "lmcache"]

    return resolved


@pytest.mark.parametrize("what", UNCACHED)
def test_what_cannot_be_cached_runs_without_the_connector_and_says_so_once(what: str, resolve: Any) -> None:
    options, reason = UNCACHED[what]
    config, [line] = resolve(options, {"not": "a setting"})
    assert config.kv_transfer_config is None
    assert line.startswith("cache-disabled reason=")
    assert reason in line
    with pytest.raises(UnsupportedError, match=reason):
        resolve(options, {"strict": True})


@pytest.mark.parametrize("what", CACHED)
def test_what_can_be_cached_keeps_the_connector(what: str, resolve: Any) -> None:
    config, lines = resolve(CACHED[what], {"strict": True})
    assert config.kv_transfer_config.kv_connector == "LMCacheConnector"
    assert lines == []


def test_a_model_for_which_vllm_itself_caches_no_prefixes_is_not_cached(
    resolve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does so where a prefix's KV is no function of the prefix, or cannot be continued from."""
    from vllm.config import VllmConfig

    def switch_off(config: Any) -> None:
        config.cache_config.enable_prefix_caching = False

    monkeypatch.setattr(VllmConfig, "try_verify_and_update_config", switch_off)
    config, [line] = resolve({}, {})
    assert config.kv_transfer_config is None
    assert "vLLM has switched prefix caching off" in line


def test_another_connector_is_left_alone(resolve: Any) -> None:
    given = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer_init": True, "pipeline_parallel_size": 2}
    other = KVTransferConfig(
        kv_connector="ExampleConnector", kv_role="kv_both", kv_connector_extra_config={"shared_storage_path": "/tmp"}
    )
    arguments = EngineArgs(model=str(model_folder("llama")), kv_transfer_config=other, **given)
    assert arguments.create_engine_config().kv_transfer_config is other
