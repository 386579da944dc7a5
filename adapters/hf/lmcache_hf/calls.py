"""Which calls of `generate` can be cached: everything is named here that makes KV depend on more than tokens, or the
output on more than the cache's contents.
"""

from __future__ import annotations

from typing import Any

import torch

from lmcache_hf import compat
from lmcache_hf.geometry import UnsupportedError


def refuse_by_call(model: Any, call: compat.Call) -> None:
    """Raise `UnsupportedError` with the reason, if there is one."""
    _refuse_mode(model, call)
    _refuse_settings(call)
    _refuse_inputs(call)


def _refuse_mode(model: Any, call: compat.Call) -> None:
    if model.training:
        raise UnsupportedError(
            "training", "the model is in training mode, where dropout makes KV random; call model.eval()"
        )
    if torch.is_autocast_enabled(model.device.type):
        raise UnsupportedError("autocast", "autocast computes KV in another dtype than the model's own")
    if call.arguments.get("custom_generate") is not None:
        raise UnsupportedError("custom_generate", "the call replaces the decoding loop")
    if call.arguments.get("assistant_model") is not None or getattr(call.settings, "prompt_lookup_num_tokens", None):
        raise UnsupportedError("assisted", "assisted decoding puts tokens into the cache that it takes back later")
    if (call.settings.num_beams or 1) > 1:
        raise UnsupportedError("beams", f"{call.settings.num_beams} beams reorder the rows of the cache")
    if (call.settings.num_return_sequences or 1) > 1:
        raise UnsupportedError("return_sequences", "several sequences a prompt repeat the rows of the cache")
    if (mode := compat.decoding_mode(call)) != "":
        raise UnsupportedError("mode", f"decoding mode {mode!r} is neither greedy search nor sampling")


def _refuse_settings(call: compat.Call) -> None:
    settings = call.settings
    if settings.use_cache is False:
        raise UnsupportedError("use_cache", "the call says use_cache=False")
    if settings.cache_implementation is not None:
        raise UnsupportedError("cache_implementation", f"the call asks for {settings.cache_implementation!r}")
    if getattr(settings, "token_healing", False):
        raise UnsupportedError("token_healing", "token healing changes the prompt inside generate")
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise UnsupportedError(
            "prefill_chunk_size", "chunked prefill starts at the first token whatever the cache holds"
        )
    if settings.output_attentions or settings.output_hidden_states:
        raise UnsupportedError("hidden_states", "the call wants hidden states or attentions of all tokens")


def _refuse_inputs(call: compat.Call) -> None:
    for name, value in call.inputs.items():
        if name in compat.NEUTRAL_INPUTS or name == "input_ids":
            continue
        if name == "inputs_embeds":
            raise UnsupportedError("inputs_embeds", "embeddings instead of tokens have no name")
        if name == "position_ids":
            raise UnsupportedError("position_ids", "the call places tokens at positions of its own")
        if name in compat.ZERO_IS_NEUTRAL and isinstance(value, torch.Tensor) and not bool(value.any()):
            continue
        kind = "multimodal" if _MULTIMODAL.intersection(name.split("_")) else "model_inputs"
        raise UnsupportedError(kind, f"input {name!r} may decide KV, and is not part of its name")


_MULTIMODAL = frozenset({"pixel", "image", "images", "video", "videos", "audio", "features"})
