"""A new process with only the folder on disk; and a folder with corrupted files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hflab as lab
import pytest
import torch

from lmcache_hf import CachedModel

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import hflab as lab, torch
from lmcache_hf import CachedModel
torch.set_num_threads(1)
name, folder, ids, dtype = json.loads(sys.argv[2])
model = lab.MODELS[name]().to(getattr(torch, dtype))
with CachedModel(model, lab.config(disk_path=folder)) as cached:
    out = lab.greedy(cached, torch.tensor(ids))
    stats = cached.stats()
logits = [x.view(torch.uint8).flatten().tolist() for x in out.logits]
from_disk = stats["engine"].get('lmcache_hit_tokens_total{tier="disk"}')
print(json.dumps([stats["hit_tokens"], from_disk, out.sequences.tolist(), logits]))
"""


def in_a_new_process(name: str, folder: Path, ids: torch.Tensor, dtype: str) -> Any:
    task = json.dumps([name, str(folder), ids.tolist(), dtype])
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("gemma", "float32"), ("mla", "float32")])
def test_a_new_process_answers_from_disk_alone(name: str, dtype: str, folder: Path) -> None:
    model = lab.MODELS[name]().to(getattr(torch, dtype))
    reference = lab.recorded_cache(model)
    with CachedModel(model, lab.config(disk_path=folder)) as cached:
        out = lab.greedy(cached, lab.prompt(70))
        lab.greedy(model, lab.prompt(70), past_key_values=reference)
    more = lab.continued(out, 9, seed=1)
    hit, from_disk, sequences, logits = in_a_new_process(name, folder, more, dtype)
    assert hit == 80
    assert from_disk == 80
    expected = lab.greedy(model, more, past_key_values=lab.cut(reference, 80))
    assert sequences == expected.sequences.tolist()
    assert logits == [x.view(torch.uint8).flatten().tolist() for x in expected.logits]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 0x40
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("poison", [flip_a_byte, truncate, empty])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_poisoned_file_is_a_miss_and_the_answer_is_right(poison: Any, name: str, folder: Path) -> None:
    model = lab.MODELS[name]()
    ids = lab.prompt(70)
    with CachedModel(model, lab.config(disk_path=folder)) as cached:
        lab.greedy(cached, ids)
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix == ".safetensors"]
    assert len(files) >= 5
    for file in files:
        poison(file)
    with CachedModel(model, lab.config(disk_path=folder)) as cached:
        lab.assert_same(lab.greedy(cached, ids), lab.greedy(model, ids))
        assert cached.stats()["hit_tokens"] == 0


def test_one_poisoned_file_in_the_middle_ends_the_hit_before_it(folder: Path) -> None:
    model = lab.llama()
    ids = lab.prompt(70)
    with CachedModel(model, lab.config(disk_path=folder)) as cached:
        lab.greedy(cached, ids)
        cached.flush()
        files = set(folder.rglob("*.safetensors"))
        lab.greedy(cached, ids[:, :20])  # nothing new to store
        cached.flush()
        assert set(folder.rglob("*.safetensors")) == files
    for file in sorted(files)[:1]:
        flip_a_byte(file)
    with CachedModel(model, lab.config(disk_path=folder)) as cached:
        hit = cached.hit_tokens(ids[0])
        got = lab.greedy(cached, ids)
        assert got.sequences.tolist() == lab.greedy(model, ids).sequences.tolist()
        assert cached.stats()["hit_tokens"] <= hit
        again = lab.greedy(cached, ids)  # and was stored again
        assert again.sequences.tolist() == got.sequences.tolist()
        assert cached.stats()["hit_tokens"] >= 64


def test_a_model_dropped_without_close_leaves_its_kv_on_disk(folder: Path) -> None:
    opened = "CachedModel(model, lab.config(disk_path=folder))"
    code = CHILD.replace(f"with {opened} as cached:", f"if cached := {opened}:")
    assert code != CHILD
    task = json.dumps(["llama", str(folder), lab.prompt(70).tolist(), "float32"])
    command = [sys.executable, "-c", code, str(Path(__file__).parent), task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    with CachedModel(lab.llama(), lab.config(disk_path=folder)) as cached:
        assert cached.hit_tokens(lab.prompt(70)[0]) == 64
