"""Which calls of `generate` can be cached: everything is named here that makes KV depend on more than tokens, or the
output on more than the cache's contents.
"""

from __future__ import annotations

from typing import Any

import torch

from lmcache.adapter import UnsupportedError
from lmcache_hf import compat


def refuse_by_call(model: Any, call: compat.Call) -> None:
    """Raise `UnsupportedError` with the reason, if there is one."""
    _refuse_mode(model, call)
    _refuse_settings(call)
    _refuse_inputs(call)


def _refuse_mode(model: Any, call: compat.Call) -> None:
    if model.training:
        raise UnsupportedError(
            "the model is in training mode, where dropout makes KV random; call model.eval()", reason="training"
        )
    if torch.is_autocast_enabled(model.device.type):
        raise UnsupportedError("autocast computes KV in another dtype than the model's own", reason="autocast")
    if call.arguments.get("custom_generate") is not None:
        raise UnsupportedError("the call replaces the decoding loop", reason="custom_generate")
    if call.arguments.get("assistant_model") is not None or getattr(call.settings, "prompt_lookup_num_tokens", None):
        raise UnsupportedError(
            "assisted decoding puts tokens into the cache that it takes back later", reason="assisted"
        )
    if (call.settings.num_beams or 1) > 1:
        raise UnsupportedError(f"{call.settings.num_beams} beams reorder the rows of the cache", reason="beams")
    if (call.settings.num_return_sequences or 1) > 1:
        raise UnsupportedError("several sequences a prompt repeat the rows of the cache", reason="return_sequences")
    if (mode := compat.decoding_mode(call)) != "":
        raise UnsupportedError(f"decoding mode {mode!r} is neither greedy search nor sampling", reason="mode")


def _refuse_settings(call: compat.Call) -> None:
    settings = call.settings
    if settings.use_cache is False:
        raise UnsupportedError("the call says use_cache=False", reason="use_cache")
    if settings.cache_implementation is not None:
        raise UnsupportedError(f"the call asks for {settings.cache_implementation!r}", reason="cache_implementation")
    if getattr(settings, "token_healing", False):
        raise UnsupportedError("token healing changes the prompt inside generate", reason="token_healing")
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise UnsupportedError(
            "chunked prefill starts at the first token whatever the cache holds", reason="prefill_chunk_size"
        )
    if settings.output_attentions or settings.output_hidden_states:
        raise UnsupportedError("the call wants hidden states or attentions of all tokens", reason="hidden_states")


def _refuse_inputs(call: compat.Call) -> None:
    for name, value in call.inputs.items():
        if name in compat.NEUTRAL_INPUTS or name == "input_ids":
            continue
        if name == "inputs_embeds":
            raise UnsupportedError("embeddings instead of tokens have no name", reason="inputs_embeds")
        if name == "position_ids":
            raise UnsupportedError("the call places tokens at positions of its own", reason="position_ids")
        if name in compat.ZERO_IS_NEUTRAL and isinstance(value, torch.Tensor) and not bool(value.any()):
            continue
        kind = "multimodal" if _MULTIMODAL.intersection(name.split("_")) else "model_inputs"
        raise UnsupportedError(f"input {name!r} may decide KV, and is not part of its name", reason=kind)


_MULTIMODAL = frozenset({"pixel", "image", "images", "video", "videos", "audio", "features"})
