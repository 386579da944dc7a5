"""Measures lookups: every chunk of a prompt is hashed, looked up in the index, leased and released."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lmcache.config import Config
from lmcache.engine import CacheEngine
from lmcache.layout import Layout, PagedKV
from lmcache.spec import KVSpec, Numerics


@dataclass(frozen=True)
class LookupResult:
    """Speed of `CacheEngine.lookup` for a prompt that is fully cached in DRAM.

    Attributes:
        tokens: length of the prompt.
        source: type of the token ids: tensor, numpy or list.
        lookup_mtokens_per_s: million tokens per second; the best of all repetitions, each on a different prompt.
        milliseconds: duration of one lookup.
    """

    tokens: int
    source: str
    lookup_mtokens_per_s: float
    milliseconds: float


def measure(tokens: int = 131_072, *, chunk_tokens: int = Config.chunk_tokens, repeat: int = 20) -> list[LookupResult]:
    """Measures lookups of `repeat` different, fully cached prompts, given as tensors, numpy arrays and lists."""
    spec = KVSpec.uniform(
        "bench", layers=1, kv_heads=1, head_dim=8, dtype=torch.int8, numerics=Numerics(engine="bench")
    )
    chunks = tokens // chunk_tokens
    config = Config(chunk_tokens=chunk_tokens, dram_bytes=repeat * chunks * spec.object_bytes(0, chunk_tokens))
    pool = torch.zeros(tokens, 1, 16, dtype=torch.int8)
    kv = PagedKV([pool], Layout.parse("slot head (kv dim)"))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 150_000, (tokens,), generator=generator) for _ in range(repeat)]
    forms: dict[str, list[Any]] = {
        "tensor": list(prompts),
        "numpy": [prompt.numpy() for prompt in prompts],
        "list": [prompt.tolist() for prompt in prompts],
    }
    results = []
    with CacheEngine(config, spec) as engine:
        for prompt in prompts:
            engine.store(prompt, kv, torch.arange(tokens))
        for source, inputs in forms.items():
            best = float("inf")
            for prompt in inputs:
                began = time.perf_counter()
                with engine.lookup(prompt) as hit:
                    found = hit.tokens
                best = min(best, time.perf_counter() - began)
                if found != chunks * chunk_tokens:
                    raise RuntimeError(f"{found} of {chunks * chunk_tokens} tokens found")
            results.append(LookupResult(tokens, source, tokens / best / 1e6, best * 1e3))
    return results
