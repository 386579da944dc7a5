"""Resetting vLLM's caches together with ours: this process uses new names, and everybody's objects on disk stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

SCRIPT = """
import json, sys
import lmcache_vllm.testing.environment
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
import torch
from lmcache import CacheEngine, Config, KVSpec, Layout, PagedKV
from lmcache_conformance.labs.models import model_folder

theirs = list(range(160))
spec = KVSpec.uniform(model="another", layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)
layout = Layout.parse("block head slot (kv dim)", block_tokens=16)
kv = PagedKV([torch.randn(10, 2, 16, 128) for _ in range(2)], layout)

def another(store):
    with CacheEngine(Config(chunk_tokens=32, dram_bytes="16MiB", disk_path=sys.argv[1]), spec) as engine:
        if store:
            engine.store(theirs, kv, torch.arange(160))
            engine.flush()
        return engine.lookup(theirs).tokens

another(store=True)
llm = LLM(
    model=str(model_folder("llama")), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
    max_model_len=512, block_size=32, num_gpu_blocks_override=40,
    kv_transfer_config=KVTransferConfig(
        kv_connector="LMCacheConnector", kv_role="kv_both",
        kv_connector_extra_config={"chunk_tokens": 32, "dram_bytes": "16MiB", "disk_path": sys.argv[1]},
    ),
)
core = llm.llm_engine.engine_core.engine_core

def ask(first=3):
    prompt = {"prompt_token_ids": list(range(first, first + 200))}
    [out] = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0, detokenize=False), use_tqdm=False)
    while core.scheduler.has_requests():
        core.step()
    return out.num_cached_tokens, list(out.outputs[0].token_ids)

found = {"first": ask()}
assert llm.reset_prefix_cache()
found["again"] = ask()
assert llm.reset_prefix_cache(reset_connector=True)
found["reset"] = ask()
assert llm.reset_prefix_cache()
found["after"] = ask()
found["another"] = another(store=False)
found["late"] = ask(203)
from vllm.distributed.kv_transfer import get_kv_transfer_group
from lmcache_vllm.plugin import watch_worker
watch_worker(llm.llm_engine.vllm_config)  # CPUs have no sleep mode: the calls are vLLM's, and keep the memory
assert llm.reset_prefix_cache()
llm.collective_rpc("sleep")
found["asleep"] = get_kv_transfer_group()._worker._kv is None
llm.collective_rpc("wake_up", kwargs={"tags": ["weights"]})
found["half asleep"] = get_kv_transfer_group()._worker._kv is None
llm.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
found["awake"] = ask()
llm.collective_rpc("reload_weights")
assert llm.reset_prefix_cache()
found["reloaded"] = ask()
numerics = get_kv_transfer_group()._worker._spec.numerics
found["measured"] = {name: bits for name, bits in numerics.extra if name.startswith("measured")}
print("FOUND", json.dumps(found))
llm.llm_engine.engine_core.shutdown()
"""


def run(disk: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(disk)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.slow
def test_a_reset_renames_what_this_process_computes_and_leaves_every_tier_as_it_is(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    written: set[Path] = set()
    rounding = []
    for process, kept in (("first", 0), ("second", 192)):
        found = run(disk)
        rounding.append(found["measured"])
        assert found["first"][0] == kept, f"{process} process: what was stored before a reset is right after a restart"
        assert found["again"][0] == 192, "no hit before the reset: the test shows nothing"
        assert found["reset"][0] == 0, "served after a reset"
        assert found["after"][0] == 192, "nothing is cached after a reset"
        assert found["late"][0] == 0, f"{process} process: hits objects that the other computed after its reset"
        assert len({tuple(tokens) for _, tokens in (found[name] for name in ("first", "again", "reset", "after"))}) == 1
        assert all((found["asleep"], found["half asleep"])), "KV is touched while vLLM has released its memory"
        assert found["awake"][0] == 192, "after waking up nothing is loaded"
        assert found["reloaded"][0] == 0, "KV of earlier weights is served after a reload"
        assert found["awake"][1] == found["reloaded"][1] == found["first"][1]
        assert found["another"] == 160, "a reset removes another model's objects"
        there = {path.relative_to(disk) for path in disk.rglob("*.safetensors")}
        assert written < there, "a reset removes objects, or nothing is written after one"
        written = there
    assert set(rounding[0]) == {"measured matmul", "measured attention"}
    assert rounding[0] == rounding[1], "two processes round alike and measured otherwise"
