"""Which calls of `generate` can be cached: everything is named here that makes KV depend on more than tokens, or the
output on more than the cache's contents.
"""

from __future__ import annotations

from typing import Any

import torch

from lmcache_hf import quirks
from lmcache_hf.geometry import Unsupported


def refuse_by_call(model: Any, call: quirks.Call) -> None:
    """Raise `Unsupported` with the reason, if there is one."""
    _refuse_mode(model, call)
    _refuse_settings(call)
    _refuse_inputs(call)


def _refuse_mode(model: Any, call: quirks.Call) -> None:
    if model.training:
        raise Unsupported("training", "the model is in training mode, where dropout makes KV random; call model.eval()")
    if torch.is_autocast_enabled(model.device.type):
        raise Unsupported("autocast", "autocast computes KV in another dtype than the model's own")
    if call.arguments.get("custom_generate") is not None:
        raise Unsupported("custom_generate", "the call replaces the decoding loop")
    if call.arguments.get("assistant_model") is not None or getattr(call.settings, "prompt_lookup_num_tokens", None):
        raise Unsupported("assisted", "assisted decoding puts tokens into the cache that it takes back later")
    if (call.settings.num_beams or 1) > 1:
        raise Unsupported("beams", f"{call.settings.num_beams} beams reorder the rows of the cache")
    if (call.settings.num_return_sequences or 1) > 1:
        raise Unsupported("return_sequences", f"{call.settings.num_return_sequences} sequences a prompt repeat its rows")
    if (mode := quirks.decoding_mode(call)) != "":
        raise Unsupported("mode", f"decoding mode {mode!r} is neither greedy search nor sampling")


def _refuse_settings(call: quirks.Call) -> None:
    settings = call.settings
    if settings.use_cache is False:
        raise Unsupported("use_cache", "the call says use_cache=False")
    if settings.cache_implementation is not None:
        raise Unsupported("cache_implementation", f"the call asks for a cache of kind {settings.cache_implementation!r}")
    if getattr(settings, "token_healing", False):
        raise Unsupported("token_healing", "token healing changes the prompt inside generate")
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise Unsupported("prefill_chunk_size", "chunked prefill starts at the first token whatever the cache holds")
    if settings.output_attentions or settings.output_hidden_states:
        raise Unsupported("hidden_states", "attentions or hidden states of all prompt tokens are wanted, so all are computed")


def _refuse_inputs(call: quirks.Call) -> None:
    for name, value in call.inputs.items():
        if name in quirks.NEUTRAL_INPUTS or name == "input_ids":
            continue
        if name == "inputs_embeds":
            raise Unsupported("inputs_embeds", "embeddings instead of tokens have no name")
        if name == "position_ids":
            raise Unsupported("position_ids", "the call places tokens at positions of its own")
        if name in quirks.ZERO_IS_NEUTRAL and isinstance(value, torch.Tensor) and not bool(value.any()):
            continue
        kind = "multimodal" if _MULTIMODAL.intersection(name.split("_")) else "model_inputs"
        raise Unsupported(kind, f"input {name!r} may change what tokens stand for, and no digest of it is part of the name")


_MULTIMODAL = frozenset({"pixel", "image", "images", "video", "videos", "audio", "features"})
