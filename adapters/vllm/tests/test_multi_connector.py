"""Our connector beside another one under `MultiConnector`, in either position; and vLLM's `kv_role`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

PEERS = """
from dataclasses import dataclass
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1, KVConnectorHandshakeMetadata, KVConnectorMetadata
)

@dataclass
class Card(KVConnectorHandshakeMetadata):
    address: str = "10.0.0.1:5600"

class Peer(KVConnectorBase_V1):
    serves = 0

    def get_handshake_metadata(self):
        return Card()

    def set_xfer_handshake_metadata(self, metadata):
        assert all(isinstance(card, Card) for card in metadata.values()), "another connector's metadata"

    def get_num_new_matched_tokens(self, request, computed):
        return max(0, self.serves - computed), False

    def build_connector_meta(self, output):
        return KVConnectorMetadata()

    start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = lambda self, *a, **k: None
    update_state_after_alloc = start_load_kv
"""

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import lmcache_vllm.testing.environment
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from lmcache_conformance.labs.models import model_folder

def child(role, **cache):
    cache = {"chunk_tokens": 32, "dram_bytes": "64MiB", "strict": True, **cache}
    return {"kv_connector": "LMCacheConnector", "kv_role": role, "kv_connector_extra_config": cache}

peer = {"kv_connector": "Peer", "kv_connector_module_path": "peers", "kv_role": "kv_both"}
children = eval(sys.argv[2])
llm = LLM(
    model=str(model_folder("llama")), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
    max_model_len=512, block_size=32, num_gpu_blocks_override=60, disable_hybrid_kv_cache_manager=True,
    kv_transfer_config=KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": children}
    ),
)
core = llm.llm_engine.engine_core.engine_core
connectors = core.scheduler.connector.sub_connectors
ours = [connector._scheduler for connector in connectors if hasattr(connector, "_scheduler")]

def ask(first):
    prompt = {"prompt_token_ids": list(range(first, first + 200))}
    [out] = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
    while core.scheduler.has_requests():
        core.step()
    assert llm.reset_prefix_cache()
    return out.num_cached_tokens

def counted(name, scheduler=0):
    return sum(v for k, v in ours[scheduler].metrics.snapshot().items() if k.startswith(f"lmcache_{name}_tokens_total"))

exec(sys.argv[3])
print("FOUND", json.dumps(found))
llm.llm_engine.engine_core.shutdown()
"""

BESIDE = """
found = {"asked": [ask(3), ask(3)], "hit": counted("hit")}
peers = [connector for connector in connectors if not hasattr(connector, "_scheduler")]
for peer in peers:
    peer.serves = 64
found["its own"] = [ask(203), ask(203)]
found["counted"] = counted("hit")
found["both"] = ask(3)
found["loaded"] = counted("loaded")
for peer in peers:
    peer.serves = 0
found["without it"] = [ask(203), ask(203)]
"""

ROLES = """
found = {"asked": [ask(3), ask(3)], "hit": [counted("hit", n) for n in range(2)]}
found["stored"] = [counted("stored", n) for n in range(2)]
"""


def run(folder: Path, children: str, code: str) -> dict[str, Any]:
    (folder / "peers.py").write_text(PEERS)
    command = [sys.executable, "-c", SCRIPT, str(folder), children, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.parametrize("children", ["[peer, child('kv_both')]", "[child('kv_both'), peer]"])
def test_beside_another_connector_ours_starts_and_counts_and_stores_only_what_is_its_own(
    tmp_path: Path, children: str
) -> None:
    found = run(tmp_path, children, BESIDE)
    first = children.startswith("[child")
    assert found["asked"] == [0, 192], "the first request is neither missed nor unstored"
    assert found["hit"] == 192
    assert found["its own"] == [64, 64]
    assert found["counted"] == 192, "another connector's hit is counted as ours"
    assert found["both"] == (192 if first else 64), "MultiConnector takes the first that has something"
    assert found["loaded"] == (384 if first else 192), "loads what vLLM does not wait for"
    assert found["without it"] == [0, 192], "what another connector had loaded was stored as this engine's"


def test_a_producer_only_stores_and_a_consumer_only_loads(tmp_path: Path) -> None:
    disk = f"disk_path={str(tmp_path / 'disk')!r}"
    found = run(tmp_path, f"[child('kv_producer', {disk}), child('kv_consumer', {disk})]", ROLES)
    assert found["asked"] == [0, 192]
    assert found["hit"] == [0, 192], "a producer loads"
    assert found["stored"] == [192, 0], "a consumer stores"
