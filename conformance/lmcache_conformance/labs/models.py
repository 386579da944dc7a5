"""Test models: tiny ones with random weights, generated once per machine, and one small real model.

Each is a folder in the format of `from_pretrained`, in float32; an engine loads it in the dtype under test. The random
weights have a standard deviation large enough that greedy output varies: constant output would hide errors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import platformdirs

TINY = ("llama", "gemma3", "deepseek", "mellum")
"""In this order: grouped-query attention with 2 kv heads (the shape that two layouts share), sliding windows, multi-head
latent attention, and sliding windows for which SGLang keeps a separate pool beside that of full attention."""

REAL = ("smollm2",)
MODELS = TINY + REAL

VOCABULARY = 1024
"""Vocabulary size of the tiny models. Token 0 pads, 1 ends, 2 begins; ids from 3 on are ordinary."""

WINDOW = 64
"""`sliding_window` of the tiny gemma3 and mellum: each token attends to 63 previous ones."""

_STD = 0.08
_VERSION = 2  # increase whenever a change here alters the generated models


def model_folder(name: str, *, seed: int = 1, root: Path | None = None) -> Path:
    """Returns the folder of a model, created on the first call (takes 1 s for tiny models, 15 s for the real one).

    Several processes may call this at once; the first result is kept.

    Args:
        name: one of `MODELS`.
        seed: selects other weights of the same tiny architecture.
        root: where models are stored; by default the user's cache folder.

    Raises:
        ValueError: there is no such model.
    """
    if name in REAL:
        providers = {point.name: point for point in entry_points(group="lmcache.models")}
        if name not in providers:
            raise ValueError(f"no installed package provides {name!r}; lmcache_hf does: pip install 'lmcache-sdk[hf]'")
        return Path(providers[name].load()())
    if name not in _BUILD:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(MODELS)}")
    models = root or Path(platformdirs.user_cache_dir("lmcache")) / "conformance"
    final = models / f"{name}-{_VERSION}-{seed}"
    if (final / "config.json").is_file():
        return final
    models.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=models))
    try:
        build(name, seed).save_pretrained(work)
        try:
            work.rename(final)
        except OSError:  # another process was faster
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def build(name: str, seed: int = 1, **changes: Any) -> Any:
    """Builds a tiny model in memory, float32, in evaluation mode. Equal seeds give equal weights.

    Args:
        name: one of `TINY`.
        seed: of the weights.
        **changes: overrides of its config, e.g. `num_key_value_heads=1`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    with torch.random.fork_rng(devices=[]):
        model = _BUILD[name](changes)
    return randomised(model, seed)


def randomised(model: Any, seed: int = 1) -> Any:
    """Fills a model of any architecture with random weights, drawn as in `build`, and returns it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _STD)
    model.generation_config.eos_token_id = None  # so that answers always have the requested length
    return model.eval()


def vocabulary(name: str) -> range:
    """Returns the ordinary token ids of a model, for random prompts."""
    return range(1000, 40_000) if name in REAL else range(3, VOCABULARY)


COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Config values that all tiny models share."""


def _llama(changes: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, **changes}
    make: Any = LlamaForCausalLM  # untyped
    return make(LlamaConfig(**config))


def _gemma3(changes: Mapping[str, Any]) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": WINDOW}
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**config, "layer_types": kinds, **changes}))


def _deepseek(changes: Mapping[str, Any]) -> Any:
    """Multi-head latent attention: one latent and one rotary key per token, of different sizes."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 512,  # with a rotary key of 64, the only size that vLLM's CPU kernels support
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "first_k_dense_replace": 1,
    }
    make: Any = DeepseekV2ForCausalLM  # untyped
    return make(DeepseekV2Config(**{**COMMON, **sizes, **changes}))


def _mellum(changes: Mapping[str, Any]) -> Any:
    from transformers import MellumConfig, MellumForCausalLM

    config = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": WINDOW}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "mlp_layer_types": ["dense"] * 4}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    }  # required, but all layers are dense
    make: Any = MellumForCausalLM  # untyped
    return make(MellumConfig(**{**config, **kinds, **experts, **changes}))


_BUILD: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "deepseek": _deepseek,
    "mellum": _mellum,
}
