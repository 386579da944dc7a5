"""Tiny models in the shapes that tests need, and recomputation based on stock transformers caches only."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from lmcache.config import Config
from lmcache_conformance.contract import PATIENT
from lmcache_conformance.labs.models import VOCABULARY as VOCAB
from lmcache_conformance.labs.models import build

PAD, END = 0, 1
CHUNK = 16
WINDOW = 24


def llama(seed: int = 1, kv_heads: int = 2, layers: int = 4) -> Any:
    return build("llama", seed, num_key_value_heads=kv_heads, num_hidden_layers=layers)


def gemma(window: int = WINDOW, **more: Any) -> Any:
    """Alternating sliding and full-attention layers."""
    return build("gemma3", sliding_window=window, **more)


def mla() -> Any:
    """DeepSeek-V2: the cache holds a latent and a rotary key, of different sizes, one head each."""
    return build("deepseek")


MODELS = {
    "llama": llama,
    "gqa1": lambda: llama(kv_heads=1),
    "mha": lambda: llama(kv_heads=4),
    "gemma": gemma,
    "mla": mla,
}


def config(**more: Any) -> Config:
    return Config(**{"chunk_tokens": CHUNK, "dram_bytes": "16MiB", **PATIENT, **more})


def prompt(columns: int, seed: int = 3, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, new: int = 12, **more: Any) -> Any:
    """Greedy generation with logits. `model` may be plain or cached."""
    return model.generate(
        input_ids=ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True, **more
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def assert_same(got: Any, expected: Any) -> None:
    """Tokens and logits, bit for bit."""
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert len(got.logits) == len(expected.logits)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert same_bits(a, b), f"logits of step {step} differ by {(a - b).abs().max()}"


def continued(out: Any, more: int, seed: int) -> torch.Tensor:
    """The next round's prompt: all previous tokens and `more` new ones."""
    return torch.cat([out.sequences, prompt(more, seed, rows=out.sequences.shape[0])], 1)


def recorded_cache(model: Any) -> DynamicCache:
    """A stock cache that transformers' own `crop` can cut, including sliding layers."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def cut(cache: DynamicCache, columns: int) -> DynamicCache:
    """Cuts the cache to its first `columns` columns with transformers' own `crop`."""
    if cache.get_seq_length():
        cache.crop(columns - cache.get_seq_length())
    return cache
