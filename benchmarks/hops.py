"""How many of this project's files and calls one cache operation passes through.

Counts calls from one of the project's own functions to another one, on the calling thread, while an operation is served from
warm DRAM: `files` that took part, `cross_file_calls` between two different ones, and for vLLM `chain_walks`, how often the
prompt's chain was walked in the index. Lines in third-party code are not counted. Same code, same figures: nothing is timed.

    python benchmarks/hops.py
    python benchmarks/hops.py --json --part store,lookup,retrieve
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

PACKAGES = ("lmcache", "lmcache_kernels", "lmcache_hf", "lmcache_vllm")
WALKS = {("lookup.py", "find"), ("finder.py", "find")}
"""The function that walks a chain in the index: file and name, today's and that of releases before 0.2."""

CHUNK = 256
PROMPT = 16 * CHUNK + 17


class Counter:
    """Calls between product files."""

    def __init__(self) -> None:
        self.calls = 0
        self.cross = 0
        self.walks = 0
        self.files: set[str] = set()
        self.edges: dict[tuple[str, str], int] = {}
        self._product: dict[str, str | None] = {}

    def _name(self, frame: FrameType | None) -> str | None:
        if frame is None:
            return None
        file = frame.f_code.co_filename
        if file not in self._product:
            found = [
                p for p in PACKAGES if f"/{p}/" in file and "site-packages" not in file and "/testing/" not in file
            ]
            self._product[file] = file.rpartition(f"/{found[-1]}/")[2] if found else None
        return self._product[file]

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        """For `sys.setprofile`."""
        if event != "call":
            return
        callee = self._name(frame)
        if callee is None:
            return
        self.files.add(callee)
        self.walks += (Path(frame.f_code.co_filename).name, frame.f_code.co_name) in WALKS
        caller = self._name(frame.f_back)
        if caller is None:
            return
        self.calls += 1
        if caller != callee:
            self.cross += 1
            self.edges[caller, callee] = self.edges.get((caller, callee), 0) + 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what the body does."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)

    def figures(self) -> dict[str, int]:
        """For the report."""
        return {"files": len(self.files), "calls": self.calls, "cross_file_calls": self.cross}


def core() -> dict[str, Counter]:
    """Store, lookup and retrieve of a warm `CacheEngine`."""
    import torch

    from lmcache import CacheEngine, Config, KVSpec, Layout, PagedKV

    spec = KVSpec.uniform("org/model@1", layers=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    tokens = torch.arange(PROMPT)
    blocks = -(-PROMPT // 16)
    tensors = [torch.zeros(blocks, 2, 16, 128, dtype=torch.bfloat16) for _ in range(4)]
    kv = PagedKV(tensors, Layout.parse("block head slot (kv dim)", block_tokens=16))
    slots = torch.arange(PROMPT)
    counters = {name: Counter() for name in ("store", "lookup", "retrieve")}
    with CacheEngine(Config(chunk_tokens=CHUNK, dram_bytes="64MiB"), spec) as engine:
        for _ in range(3):  # the first two fill what is remembered of layouts and names
            tokens = tokens + 1
            counters = {name: Counter() for name in counters}
            with counters["store"].counting():
                engine.store(tokens, kv, slots)
            with counters["lookup"].counting():
                hit = engine.lookup(tokens)
            with counters["retrieve"].counting():
                engine.retrieve(hit, kv, slots[: hit.tokens])
            hit.release()
    return counters


def hf() -> Counter:
    """The load part of `CachedModel.generate` for a prompt that is in DRAM."""
    import torch

    from lmcache import Config
    from lmcache_conformance.labs.models import build
    from lmcache_hf import CachedModel

    counter = Counter()
    model = build("llama")
    with CachedModel(model, Config(chunk_tokens=CHUNK, dram_bytes="64MiB")) as cached:
        prompt = torch.arange(3, 3 + 3 * CHUNK + 17)[None] % 1000
        settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        for _ in range(2):
            cached.generate(prompt, **settings)
        prepare = cached._prepare

        def counted(*args: Any) -> Any:
            with counter.counting():
                return prepare(*args)

        cached._prepare = counted  # type: ignore[method-assign]
        cached.generate(prompt, **settings)
    return counter


def vllm() -> tuple[Counter, Counter]:
    """A prompt that vLLM's own cache has lost and ours has in DRAM; and one that nobody has seen."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    import lmcache_vllm.testing.environment  # noqa: F401  # before anything of vLLM
    from lmcache_conformance.labs.models import model_folder

    transfer = KVTransferConfig(
        kv_connector="LMCacheConnector",
        kv_connector_module_path="lmcache_vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"dram_bytes": "64MiB", "chunk_tokens": CHUNK},
    )
    llm = LLM(
        str(model_folder("llama")),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_transfer_config=transfer,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def prompt(seed: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [3 + (i * 7 + seed * 131) % 1000 for i in range(4 * CHUNK + 17)]}

    hit, miss = Counter(), Counter()
    for seed in range(3):
        llm.generate([prompt(seed)], once, use_tqdm=False)
        llm.reset_prefix_cache()
        llm.generate([prompt(seed)], once, use_tqdm=False)
        llm.reset_prefix_cache()
    with hit.counting():
        llm.generate([prompt(2)], once, use_tqdm=False)
    with miss.counting():
        llm.generate([prompt(9)], once, use_tqdm=False)
    return hit, miss


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", default="store,lookup,retrieve,hf_hit,vllm_hit", help="which operations, by comma")
    parser.add_argument("--edges", action="store_true", help="print the calls between each two files, too")
    options = parser.parse_args()
    wanted = options.part.split(",")
    counters: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if {"store", "lookup", "retrieve"} & set(wanted):
            counters |= core()
        if "hf_hit" in wanted:
            counters["hf_hit"] = hf()
        if "vllm_hit" in wanted or "vllm_miss" in wanted:
            counters["vllm_hit"], counters["vllm_miss"] = vllm()
    figures = {name: counter.figures() for name, counter in counters.items()}
    if "vllm_hit" in figures:
        figures["vllm_hit"]["chain_walks"] = counters["vllm_hit"].walks
    if options.json:
        print(json.dumps(figures))
        return
    for name, found in figures.items():
        print(f"{name:10}" + "  ".join(f"{key} {value}" for key, value in found.items()))
        if options.edges:
            for (a, b), n in sorted(counters[name].edges.items(), key=lambda e: -e[1]):
                print(f"    {n:4} {a} → {b}")


if __name__ == "__main__":
    main()
