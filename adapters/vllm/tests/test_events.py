"""KV events of a real engine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as external

from lmcache.plan import Chain
from lmcache_vllm.events import Events

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


def learn(events: Events, number: int) -> None:
    """Lets a request of 16 chunks of 256 tokens be known, in vLLM's blocks of 16."""
    ids = [number % 256, number // 256]
    request: Any = SimpleNamespace(
        block_hashes=[bytes(29) + bytes([*ids, block]) for block in range(256)],
        all_token_ids=list(range(number, number + 4096)),
        lora_request=None,
    )
    events.learn(request, Chain(b"n", [bytes([*ids, chunk]) + bytes(29) for chunk in range(16)]), 0)


def test_a_known_chunk_takes_two_kilobytes_and_all_of_them_what_is_allowed() -> None:
    events = Events(256, 16)
    learn(events, 0)
    tracemalloc.start()
    for number in range(1, 201):
        learn(events, number)
    taken = tracemalloc.get_traced_memory()[0] / (200 * 16)
    tracemalloc.stop()
    assert taken < 2048
    assert events.nbytes / (201 * 16) == pytest.approx(taken, rel=0.1)
    small = Events(256, 16, limit=100_000)
    for number in range(201):
        learn(small, number)
    assert 98_000 < small.nbytes <= 100_000
    small.notice(True, "dram", b"n", 0, bytes(32))
    assert small.take() == [], "the oldest is known still"
    last = bytes([200, 0, 15]) + bytes(29)
    small.notice(True, "dram", b"n", 0, last)
    [stored] = small.take()
    assert stored.token_ids == list(range(200 + 15 * 256, 200 + 4096))
    assert stored.block_hashes == [external(bytes(29) + bytes([200, 0, block])) for block in range(240, 256)]
    assert stored.parent_block_hash == external(bytes(29) + bytes([200, 0, 239]))
    small.notice(False, "disk", b"n", 0, last)
    [removed] = small.take()
    assert removed.block_hashes == stored.block_hashes
