"""Decides which calls of `generate` can be cached: refuses every option that makes KV depend on more than the tokens, or the
output on more than the contents of the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from lmcache.adapter import UnsupportedError
from lmcache_hf import compat


def refuse_by_call(model: Any, call: compat.Call) -> None:
    """Raises `UnsupportedError` if this call cannot be cached."""
    _refuse_mode(model, call)
    _refuse_settings(call)
    _refuse_inputs(model, call)


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
            "assisted decoding adds tokens to the cache and may remove them again", reason="assisted"
        )
    if (call.settings.num_beams or 1) > 1:
        raise UnsupportedError(f"{call.settings.num_beams} beams reorder the rows of the cache", reason="beams")
    if (call.settings.num_return_sequences or 1) > 1:
        raise UnsupportedError("several sequences per prompt repeat the rows of the cache", reason="return_sequences")
    if (mode := compat.decoding_mode(call)) != "":
        raise UnsupportedError(f"decoding mode {mode!r} is neither greedy search nor sampling", reason="mode")


def _refuse_settings(call: compat.Call) -> None:
    settings = call.settings
    if settings.use_cache is False:
        raise UnsupportedError("the call sets use_cache=False", reason="use_cache")
    if settings.cache_implementation is not None:
        raise UnsupportedError(
            f"the call requests cache_implementation={settings.cache_implementation!r}", reason="cache_implementation"
        )
    if getattr(settings, "token_healing", False):
        raise UnsupportedError("token healing changes the prompt inside generate", reason="token_healing")
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise UnsupportedError(
            "chunked prefill starts at the first token even if the cache already holds it", reason="prefill_chunk_size"
        )
    if settings.output_attentions or settings.output_hidden_states:
        raise UnsupportedError("the call requests hidden states or attentions of all tokens", reason="hidden_states")


def _refuse_inputs(model: Any, call: compat.Call) -> None:
    for name, value in call.inputs.items():
        if name in compat.NEUTRAL_INPUTS or name == "input_ids" or name in compat.cache_names(model):
            continue
        if name == "inputs_embeds":
            raise UnsupportedError("prompts given as embeddings have no token ids to look up", reason="inputs_embeds")
        if name == "position_ids":
            raise UnsupportedError("the call sets its own position_ids", reason="position_ids")
        if name in compat.ZERO_IS_NEUTRAL and isinstance(value, torch.Tensor) and not bool(value.any()):
            continue
        kind = "multimodal" if _MULTIMODAL.intersection(name.split("_")) else "model_inputs"
        raise UnsupportedError(f"model input {name!r} may affect KV but is not part of the cache key", reason=kind)


_MULTIMODAL = frozenset({"pixel", "image", "images", "video", "videos", "audio", "features"})
