"""Two thousand requests, many of them cancelled, leak nothing: no memory, blocks, pins or state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

SCRIPT = """
import json, random, sys
import lmcache_vllm.testing.environment
import psutil
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from lmcache_conformance.labs.models import model_folder

llm = LLM(
    model=str(model_folder("llama")), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
    max_model_len=512, block_size=32, num_gpu_blocks_override=60, max_num_seqs=16,
    kv_transfer_config=KVTransferConfig(
        kv_connector="LMCacheConnector", kv_role="kv_both",
        kv_connector_extra_config={
            "chunk_tokens": 32, "dram_bytes": "16MiB", "disk_path": sys.argv[1], "disk_bytes": "32MiB"
        },
    ),
)
engine, core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
scheduler = core.scheduler.connector._scheduler
pool = core.scheduler.kv_cache_manager.block_pool
rng = random.Random(0)
trunks = [[rng.randrange(3, 1000) for _ in range(96)] for _ in range(40)]
params = SamplingParams(max_tokens=3, temperature=0, detokenize=False, ignore_eos=True)
number = 0

def serve(count):
    global number
    begun = 0
    while begun < count or engine.has_unfinished_requests():
        while begun < count and core.scheduler.get_num_unfinished_requests() < 24:
            number += 1
            begun += 1
            prompt = rng.choice(trunks) + [rng.randrange(3, 1000) for _ in range(20)]
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            if number % 7 == 0:
                engine.abort_request([str(number - rng.randrange(5))])
        engine.step()
    while core.scheduler.has_requests():
        core.step()

def found():
    return {
        "rss": psutil.Process().memory_info().rss,
        "free": pool.get_num_free_blocks(),
        "requests": len(scheduler._requests), "views": len(scheduler._views),
        "queued": len(scheduler._queued), "abandoned": len(scheduler._abandoned), "foreign": len(scheduler._foreign),
        **{name: value for name, value in scheduler._plane.stats().items() if name in ("jobs", "leases", "failed_owners")},
        "references": sum(held.extent.refs for p in scheduler._plane.state.pools for held in p.residents()),
        "questions": len(scheduler._plane._probes),
        "observed": len(core.model_executor.driver_worker.worker.model_runner.requests),
        "hits": scheduler.stats()["lmcache_loaded_tokens_total"],
    }

serve(600)
first = found()
serve(2000)
print("FOUND", json.dumps([first, found()]))
"""


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "disk")], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    first, last = json.loads(line.removeprefix("FOUND "))
    print(first, last)
    assert last["hits"] > first["hits"] + 10_000, "hardly anything was loaded: the test shows nothing"
    assert last["free"] == first["free"], "blocks of vLLM are still held"
    for name in (
        *("requests", "views", "queued", "abandoned", "foreign"),
        *("jobs", "leases", "failed_owners", "references", "questions"),
    ):
        assert last[name] == 0, f"{last[name]} {name} are left"
    # vLLM itself allocates memory per new batch shape, here about 20 KiB per request.
    assert last["rss"] - first["rss"] < 96 << 20, "memory grows"
