"""KV events of a real engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

SCRIPT = """
import sys
import lmcache_vllm.testing.environment
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.config.kv_events import KVEventsConfig
from lmcache_conformance.labs.models import model_folder

llm = LLM(
    model=str(model_folder("llama")), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
    max_model_len=512, block_size=32, num_gpu_blocks_override=40,
    kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    kv_transfer_config=KVTransferConfig(
        kv_connector="LMCacheConnector", kv_role="kv_both",
        kv_connector_extra_config={"chunk_tokens": 64, "dram_bytes": 1, "queue_bytes": "1MiB", "disk_path": sys.argv[1]},
    ),
)
core = llm.llm_engine.engine_core.engine_core
seen = []
publisher = core.scheduler.kv_event_publisher
publisher.publish = lambda batch: seen.extend(batch.events)

def ask(first):
    prompt = {"prompt_token_ids": [first + n for n in range(200)]}
    [out] = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
    while core.scheduler.has_requests():
        core.step()
    return out

ask(3)
for event in seen:
    print(type(event).__name__, event.medium, len(event.block_hashes), getattr(event, "token_ids", [])[:1])
seen.clear()
for first in range(210, 700, 70):
    ask(first)
print("evicted", sum(type(event).__name__ == "BlockRemoved" and event.medium == "CPU" for event in seen) > 0)
"""


@pytest.mark.slow
def test_what_is_stored_and_evicted_is_told_as_vllms_blocks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "disk")], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("Block", "evicted"))]
    ours = [line for line in lines if " CPU " in line or " STORAGE " in line]
    assert [line for line in ours if line.startswith("BlockStored CPU 2 ")] == [
        f"BlockStored CPU 2 [{3 + 64 * chunk}]" for chunk in range(3)
    ]
    assert [line for line in ours if line.startswith("BlockStored STORAGE 2 ")] == [
        f"BlockStored STORAGE 2 [{3 + 64 * chunk}]" for chunk in range(3)
    ]
    assert "evicted True" in lines
