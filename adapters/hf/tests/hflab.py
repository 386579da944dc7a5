"""Tiny random models, and recomputation to compare with, built on stock transformers caches alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from lmcache.config import Config

VOCAB = 1024
PAD, END = 0, 1
CHUNK = 16
WINDOW = 24

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}


def randomised(model: Any, seed: int = 1) -> Any:
    """Weights large enough that greedy output varies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    model.generation_config.eos_token_id = None  # so that lengths are known; tests that want an end say so
    return model.eval()


def llama(seed: int = 1, kv_heads: int = 2, layers: int = 4) -> Any:
    return randomised(
        LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=layers, num_key_value_heads=kv_heads, head_dim=64)),
        seed,
    )


def gemma(window: int = WINDOW, **more: Any) -> Any:
    """Sliding and full layers in turn."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, **more}
    return randomised(Gemma3ForCausalLM(Gemma3TextConfig(**config, sliding_window=window, layer_types=kinds)))


def mla() -> Any:
    """DeepSeek-V2: the cache holds a latent and a rotary key, of different sizes, one head each."""
    return randomised(
        DeepseekV2ForCausalLM(
            DeepseekV2Config(
                **COMMON,
                num_hidden_layers=3,
                num_key_value_heads=4,
                moe_intermediate_size=64,
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                kv_lora_rank=32,
                q_lora_rank=None,
                qk_nope_head_dim=32,
                qk_rope_head_dim=16,
                v_head_dim=32,
                first_k_dense_replace=1,
            )
        )
    )


MODELS = {
    "llama": llama,
    "gqa1": lambda: llama(kv_heads=1),
    "mha": lambda: llama(kv_heads=4),
    "gemma": gemma,
    "mla": mla,
}


def config(**more: Any) -> Config:
    return Config(**{"chunk_tokens": CHUNK, "dram_bytes": "16MiB", **more})


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
    """The next round's prompt: everything so far and `more` new tokens."""
    return torch.cat([out.sequences, prompt(more, seed, rows=out.sequences.shape[0])], 1)


def recorded_cache(model: Any) -> DynamicCache:
    """A stock cache that transformers' own `crop` can cut, sliding layers included."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def cut(cache: DynamicCache, columns: int) -> DynamicCache:
    """The same cache as it was after `columns` columns, by transformers' own means."""
    if cache.get_seq_length():
        cache.crop(columns - cache.get_seq_length())
    return cache
