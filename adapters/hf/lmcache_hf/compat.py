"""Everything that depends on how a version of transformers builds caches and reads `generate`'s arguments.

Written against transformers 5.19, by reading `cache_utils.py` and `generation/utils.py`. The rest of the adapter relies on:

- A full-attention layer holds `keys` and `values` of all columns, (batch, kv heads, columns, dim).
- A sliding layer holds the last `sliding_window − 1` columns and counts all columns in `cumulative_length`; its `update`
  returns the held columns followed by the new ones. These fields are its entire state.
- `generate` with a filled cache and the *full* `input_ids` computes only the columns missing from the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

NEUTRAL_INPUTS = frozenset({"attention_mask", "past_key_values", "use_cache", "logits_to_keep", "return_dict"})
"""Model inputs that do not affect a token's keys and values."""

ZERO_IS_NEUTRAL = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Model inputs that mean "plain text" if they are all zero."""


# ------------------------------------------------------------------ generate's arguments


@dataclass(frozen=True)
class Call:
    """One call of `generate`.

    Attributes:
        arguments: as passed, by name.
        settings: the effective generation config.
        inputs: the arguments that `generate` passes to the model's forward pass.
    """

    arguments: Mapping[str, Any]
    settings: GenerationConfig
    inputs: Mapping[str, Any]


def has_own_generate(model: Any) -> bool:
    """Whether the model overrides transformers' `generate` (PEFT's override, which only forwards the call, does not count)."""
    own = getattr(type(unwrapped(model)), "generate", None)
    return own is not GenerationMixin.generate and not type(model).__module__.startswith("peft.")


def unwrapped(model: Any) -> Any:
    """Returns the module inside `torch.compile`'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def keeps_positions(model: Any) -> str | None:
    """Returns the class of a module that keeps positions across calls (M-RoPE: Qwen2-VL and its family), or None."""
    return next((type(module).__name__ for module in model.modules() if hasattr(module, "rope_deltas")), None)


def cache_names(model: Any) -> tuple[str, ...]:
    """Returns the names under which the model's forward pass takes a cache, the preferred one first.

    Up to transformers 5.23 that is `past_key_values`; 5.24 renames it to `cache`.
    """
    known = inspect.signature(unwrapped(model).forward).parameters
    return tuple(name for name in ("past_key_values", "cache") if name in known) or ("past_key_values",)


def read_call(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Names positional arguments and resolves settings as `generate` does: keywords, then `generation_config`, then the
    model's own config.
    """
    bound = inspect.signature(GenerationMixin.generate).bind(model, *args, **kwargs)
    arguments = dict(bound.arguments)
    arguments.pop("self")
    free = arguments.pop("kwargs", {})
    gathered = {name: value for name, value in {**arguments, **free}.items() if value is not None or name in free}
    given = {k: v for k, v in free.items() if k not in ("tokenizer", "assistant_tokenizer", "trust_remote_code")}
    settings, inputs = model._prepare_generation_config(gathered.get("generation_config"), **given)
    return Call(gathered, settings, {k: v for k, v in inputs.items() if v is not None})


def decoding_mode(call: Call) -> str:
    """Returns `""` for greedy search and sampling, else the mode's name."""
    mode = call.settings.get_generation_mode(call.arguments.get("assistant_model"))
    return "" if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) else str(mode.value)


def prompt_of(model: Any, call: Call) -> torch.Tensor | None:
    """Returns the prompt's token ids, (batch, columns) int32 or int64, or None if the call has none."""
    ids = call.inputs.get("input_ids")
    if ids is None and getattr(model, "main_input_name", "input_ids") == "input_ids":
        ids = call.arguments.get("inputs")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        return None
    return ids


def mask_of(call: Call, ids: torch.Tensor) -> torch.Tensor | None:
    """Returns the attention mask, (batch, columns) bool; None if it has another shape or values other than 0 and 1.

    Without a mask, `generate` masks padding tokens only if the padding token is not an end-of-sequence token.
    """
    mask = call.inputs.get("attention_mask")
    if mask is None:
        pad, ends = call.settings.pad_token_id, end_tokens(call)
        if pad is None or pad in ends:
            return torch.ones_like(ids, dtype=torch.bool)
        found: torch.Tensor = ids != pad
        return found
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    return mask.bool()


def end_tokens(call: Call) -> tuple[int, ...]:
    """Returns the token ids that end a row."""
    ends = call.settings.eos_token_id
    if ends is None:
        return ()
    return tuple(int(e) for e in ends) if isinstance(ends, (list, tuple, torch.Tensor)) else (int(ends),)


# ------------------------------------------------------------------ caches


class RecordingSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """A sliding layer that also keeps references to columns that leave its window. Its results are unchanged.

    `recorded` holds the (key, value) states of each `update`, so during one `generate` memory grows as with full attention.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class; records the new states first."""
        self.recorded.append((key_states, value_states))
        full: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return full

    def all_recorded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of all columns passed to `update`, (batch, kv heads, columns, dim) each."""
        keys, values = zip(*self.recorded, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def stock(self) -> DynamicSlidingWindowLayer:
        """Returns a base-class layer with the same state, for callers that keep the cache."""
        layer = DynamicSlidingWindowLayer(sliding_window=self.sliding_window)
        layer.__dict__.update({k: v for k, v in self.__dict__.items() if k != "recorded"})
        return layer


def fresh_cache(model: Any) -> DynamicCache:
    """Returns the empty cache that `generate` would create for this model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def unsupported_layer(cache: DynamicCache) -> str | None:
    """Describes the first layer whose state is more than keys and values per column; None if there is no such layer."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return type(layer).__name__
        if isinstance(layer, DynamicSlidingWindowLayer) and window_of(layer) < 1:
            return f"sliding window of {layer.sliding_window}"
    return None


def window_of(layer: Any) -> int:
    """Returns how many previous columns a sliding layer keeps (`sliding_window − 1`), 0 for a full-attention layer."""
    return int(layer.sliding_window) - 1 if isinstance(layer, DynamicSlidingWindowLayer) else 0


def is_plain_empty(cache: Any) -> bool:
    """Whether this is a stock `DynamicCache` that is empty and not offloaded."""
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0


def arm(cache: DynamicCache, template: DynamicCache) -> bool:
    """Replaces an empty cache's layers: recording layers where `template` slides, full-attention layers elsewhere.

    A `DynamicCache()` created without a config has no layers yet and keeps all columns, so it only fits models without
    sliding windows.

    Returns:
        False, with the cache unchanged, if its layers do not match the template's.
    """
    wanted = [window_of(layer) for layer in template.layers]
    if cache.layers and [window_of(layer) for layer in cache.layers] != wanted:
        return False
    if not cache.layers and any(wanted):
        return False
    cache.layers = [RecordingSlidingLayer(w + 1) if w else _full_layer() for w in wanted]
    return True


def _full_layer() -> DynamicLayer:
    make: Any = DynamicLayer  # untyped
    layer: DynamicLayer = make()
    return layer


def disarm(cache: DynamicCache) -> None:
    """Replaces recording layers by stock layers with the same state."""
    cache.layers = [x.stock() if isinstance(x, RecordingSlidingLayer) else x for x in cache.layers]


def columns_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values of all columns that this layer has (since recording began, for a recording layer), oldest first."""
    if isinstance(layer, RecordingSlidingLayer):
        return layer.all_recorded()
    return layer.keys, layer.values


def fill_all(layers: Sequence[Any], contents: Sequence[tuple[torch.Tensor, torch.Tensor]], columns: int) -> None:
    """Fills empty layers with keys and values of the first `columns` columns, of which sliding layers keep the last."""
    for layer, (keys, values) in zip(layers, contents, strict=True):
        kept = min(columns, window_of(layer) or columns)
        fill(layer, keys[:, :, :kept], values[:, :, :kept], columns)


def fill(layer: Any, keys: torch.Tensor, values: torch.Tensor, columns: int) -> None:
    """Puts a layer into the state it would have after processing `columns` columns.

    Args:
        layer: an empty layer.
        keys, values: all columns, or for a sliding layer the last `min(columns, sliding_window − 1)`.
        columns: number of columns processed.
    """
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns
