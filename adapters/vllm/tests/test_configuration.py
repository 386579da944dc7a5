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
    before, separated = configuration.plain(config), 0
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
    assert separated > 100
    assert all(reason for fields in configuration.NEUTRAL.values() for reason in fields.values())


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
