"""Resetting vLLM's caches together with ours: nothing stored before is served, and new names are unique to the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

SCRIPT = """
import json, sys
import lmcache_vllm.testing.environment
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from lmcache_conformance.labs.models import model_folder

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
ask(203)  # the folder has been cleared by now; objects written during clearing may be gone
print("FOUND", json.dumps(found))
llm.llm_engine.engine_core.shutdown()
"""


def run(disk: Path) -> dict[str, tuple[int, list[int]]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(disk)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found: dict[str, tuple[int, list[int]]] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.slow
def test_after_a_reset_nothing_old_is_served_and_nothing_new_outlives_the_process(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for process in ("first", "second"):
        found = run(disk)
        assert found["first"][0] == 0, f"{process} process: hits objects that the other computed after its reset"
        assert found["again"][0] == 192, "no hit before the reset: the test shows nothing"
        assert found["reset"][0] == 0, "served after a reset"
        assert found["after"][0] == 192, "nothing is cached after a reset"
        assert len({tuple(tokens) for _, tokens in (found[name] for name in ("first", "again", "reset", "after"))}) == 1
        assert list(disk.rglob("*.safetensors")), "nothing is written after a reset"
