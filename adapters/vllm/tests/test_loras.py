"""A LoRA's KV is cached only while what vLLM has in memory can be nothing but what its files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from lmcache_vllm.names import Loras, Unnamed


def write(folder: Path, content: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.bin").write_bytes(content)
    return str(folder)


def lora(path: str, number: int = 1, name: str = "a", **more: Any) -> Any:
    return SimpleNamespace(lora_path=path, lora_int_id=number, lora_name=name, **more)


def request(adapter: Any) -> Any:
    return SimpleNamespace(lora_request=adapter)


@pytest.fixture
def loras() -> Loras:
    return Loras()


def assert_unnamed(loras: Loras, adapter: Any) -> None:
    with pytest.raises(Unnamed) as unnamed:
        loras.name_of(request(adapter))
    assert unnamed.value.reason == "lora"
    assert not loras.is_loaded(request(adapter))


def test_an_adapter_is_loaded_once_it_was_used_or_loaded_ahead(loras: Loras, tmp_path: Path) -> None:
    first, second = lora(write(tmp_path / "a", b"1")), lora(write(tmp_path / "b", b"2"), 2, "b")
    assert loras.is_loaded(request(None))
    assert loras.name_of(request(first))
    assert not loras.is_loaded(request(first)), "a hit before vLLM has read the files: these may be replaced until then"
    loras.used(request(first))
    assert loras.is_loaded(request(first))
    loras.loading(second)
    assert not loras.is_loaded(request(second))
    loras.loaded(second)
    assert loras.is_loaded(request(second))


@pytest.mark.parametrize("when", ["while it is loaded", "between loading and its first request", "before it was used"])
def test_files_that_are_replaced_around_loading_name_nothing(when: str, loras: Loras, tmp_path: Path) -> None:
    adapter = lora(write(tmp_path / "a", b"old"))
    if when == "before it was used":
        loras.name_of(request(adapter))
        write(tmp_path / "a", b"new")
        loras.used(request(adapter))
    else:
        loras.loading(adapter)
        if when == "while it is loaded":
            write(tmp_path / "a", b"new")
        loras.loaded(adapter)
        write(tmp_path / "a", b"new")
    assert_unnamed(loras, adapter)


def test_a_link_that_is_turned_away_and_back_names_nothing(loras: Loras, tmp_path: Path) -> None:
    """In between, vLLM may have loaded what it pointed to, and computed with it."""
    write(tmp_path / "v1", b"1"), write(tmp_path / "v2", b"2")
    link = tmp_path / "link"
    link.symlink_to("v1")
    adapter = lora(str(link))
    loras.name_of(request(adapter))
    for target in ("v2", "v1"):
        link.unlink()
        link.symlink_to(target)
        assert_unnamed(loras, adapter)


def test_an_adapter_that_is_loaded_in_place_names_nothing_under_its_id_or_name(loras: Loras, tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", b"1"), write(tmp_path / "new", b"2")
    loras.name_of(request(lora(old)))
    assert_unnamed(loras, lora(new, load_inplace=True))
    assert_unnamed(loras, lora(new))
    assert_unnamed(loras, lora(old))


SCRIPT = """
import json, shutil, sys
from pathlib import Path
import lmcache_vllm.testing.environment
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.lora.request import LoRARequest
from lmcache_conformance.labs.models import model_folder

room, base = Path(sys.argv[1]), Path(model_folder("llama"))
shape = json.loads((base / "config.json").read_text())
width, kv = shape["hidden_size"], shape["num_key_value_heads"] * shape["head_dim"]

def write(name, seed):
    made, folder = torch.Generator().manual_seed(seed), room / name
    matrices = {}
    for layer in range(shape["num_hidden_layers"]):
        for part in ("k_proj", "v_proj"):
            module = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            matrices[f"{module}.lora_A.weight"] = torch.randn(8, width, generator=made) / 10
            matrices[f"{module}.lora_B.weight"] = torch.randn(kv, 8, generator=made) / 10
    folder.mkdir(exist_ok=True)
    save_file(matrices, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)

llm = LLM(
    model=str(base), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, block_size=32,
    num_gpu_blocks_override=60, enable_lora=True, max_loras=2, max_cpu_loras=8, max_lora_rank=8,
    kv_transfer_config=KVTransferConfig(
        kv_connector="LMCacheConnector", kv_role="kv_both",
        kv_connector_extra_config={"chunk_tokens": 32, "dram_bytes": "64MiB"},
    ),
)
engine = llm.llm_engine

def ask(lora):
    assert llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=6, temperature=0, detokenize=False, ignore_eos=True)
    [out] = llm.generate([{"prompt_token_ids": list(range(3, 203))}], params, use_tqdm=False, lora_request=lora)
    return [out.num_cached_tokens, list(out.outputs[0].token_ids)]

a = LoRARequest("a", 1, write("a", 1))
found = {"used": [ask(a), ask(a)]}
shutil.copytree(room / "a", room / "twin")
twin = LoRARequest("twin", 2, str(room / "twin"))
engine.add_lora(twin)
found["loaded ahead"] = [ask(twin)]
b = LoRARequest("b", 3, write("b", 2))
engine.add_lora(b)
write("b", 3)  # vLLM keeps what it has loaded
found["replaced after loading"] = [ask(b), ask(b)]
c = LoRARequest("c", 4, write("c", 3))
engine.add_lora(c)
found["what replaced it"] = [ask(c)]
write("c", 4)
engine.add_lora(LoRARequest("c", 4, c.lora_path, load_inplace=True))
found["loaded in place"] = [ask(c), ask(c)]
engine.remove_lora(1)
write("a", 5)
found["removed and loaded anew"] = [ask(a), ask(a)]
print("FOUND", json.dumps(found))
engine.engine_core.shutdown()
"""


@pytest.mark.slow
def test_what_vllm_has_loaded_is_served_under_its_own_name_or_not_at_all(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found: dict[str, list[Any]] = json.loads(line.removeprefix("FOUND "))
    hits = {case: [cached for cached, _ in answers] for case, answers in found.items()}
    assert hits == {
        "used": [0, 192],
        "loaded ahead": [192],
        "replaced after loading": [0, 0],
        "what replaced it": [0],
        "loaded in place": [0, 0],
        "removed and loaded anew": [0, 0],
    }
    assert found["loaded ahead"][0][1] == found["used"][0][1]
    answers = {case: found[case][-1][1] for case in hits if case != "loaded ahead"}
    assert len({tuple(tokens) for tokens in answers.values()}) == len(answers), (
        "adapters that compute alike show nothing"
    )
