"""Everything here that depends on how one version of transformers builds caches and reads `generate`'s arguments.

Written against transformers 5.19, checked by reading `cache_utils.py` and `generation/utils.py`. What the rest relies on:

- A full-attention layer holds `keys` and `values` of all columns, (batch, kv heads, columns, dim).
- A sliding layer holds the last `sliding_window − 1` columns and counts all of them in `cumulative_length`; its `update`
  returns what it held followed by what it was given. Setting both fields is therefore its whole state.
- `generate` given a filled cache and the *full* `input_ids` computes only the columns that the cache lacks.
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
"""Model inputs that do not change what a token's keys and values are."""

ZERO_IS_NEUTRAL = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Model inputs that mean "plain text" where they are all zero."""


# ------------------------------------------------------------------ generate's arguments


@dataclass(frozen=True)
class Call:
    """One call of `generate`, its arguments gathered by name, and the settings that will be in force."""

    arguments: Mapping[str, Any]
    settings: GenerationConfig
    inputs: Mapping[str, Any]


def has_own_generate(model: Any) -> bool:
    """Whether the model replaces transformers' `generate` with one of its own (PEFT's only passes on)."""
    own = getattr(type(unwrapped(model)), "generate", None)
    return own is not GenerationMixin.generate and not type(model).__module__.startswith("peft.")


def unwrapped(model: Any) -> Any:
    """The module under `torch.compile`'s wrapper."""
    return getattr(model, "_orig_mod", model)


def read_call(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Name the positional arguments, and resolve settings as `generate` does: keywords, then `generation_config`, then
    the model's own.
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
    """`""` for greedy search and sampling; else the mode's name."""
    mode = call.settings.get_generation_mode(call.arguments.get("assistant_model"))
    return "" if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) else str(mode.value)


def prompt_of(model: Any, call: Call) -> torch.Tensor | None:
    """The prompt's token ids, (batch, columns), or None if the call does not give any."""
    ids = call.inputs.get("input_ids")
    if ids is None and getattr(model, "main_input_name", "input_ids") == "input_ids":
        ids = call.arguments.get("inputs")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        return None
    return ids


def mask_of(call: Call, ids: torch.Tensor) -> torch.Tensor | None:
    """Which columns hold tokens, (batch, columns) bool; None if the mask is not of that kind.

    Without a mask, `generate` takes padding for padding only where the padding token cannot be an end-of-sequence token.
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
    """Token ids that end a row."""
    ends = call.settings.eos_token_id
    if ends is None:
        return ()
    return tuple(int(e) for e in ends) if isinstance(ends, (list, tuple, torch.Tensor)) else (int(ends),)


# ------------------------------------------------------------------ caches


class RecordingSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """A sliding layer that also keeps what leaves its window, by reference. What it computes is unchanged.

    `recorded` holds the (key, value) states of each `update`; memory grows as for full attention during one `generate`.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base class does, after noting the new states."""
        self.recorded.append((key_states, value_states))
        full: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return full

    def all_recorded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every column seen by `update`, (batch, kv heads, columns, dim)."""
        keys, values = zip(*self.recorded, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def stock(self) -> DynamicSlidingWindowLayer:
        """The same state in a layer of the base class, for callers who keep the cache."""
        layer = DynamicSlidingWindowLayer(sliding_window=self.sliding_window)
        layer.__dict__.update({k: v for k, v in self.__dict__.items() if k != "recorded"})
        return layer


def fresh_cache(model: Any) -> DynamicCache:
    """The empty cache that `generate` would make for this model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def unsupported_layer(cache: DynamicCache) -> str | None:
    """What the first layer is whose state is more than the keys and values of whole columns, or None."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return type(layer).__name__
        if isinstance(layer, DynamicSlidingWindowLayer) and window_of(layer) < 1:
            return f"sliding window of {layer.sliding_window}"
    return None


def window_of(layer: Any) -> int:
    """How many previous columns a sliding layer keeps (`sliding_window − 1`), 0 for a full-attention layer."""
    return int(layer.sliding_window) - 1 if isinstance(layer, DynamicSlidingWindowLayer) else 0


def is_plain_empty(cache: Any) -> bool:
    """Whether this is a stock `DynamicCache` that holds nothing yet and is not offloaded."""
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0


def arm(cache: DynamicCache, template: DynamicCache) -> bool:
    """Give an empty cache recording layers where `template` slides. False: its layers differ from the template's.

    A `DynamicCache()` made without a config has no layers yet and will keep everything; it suits models that do not slide.
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
    """Turn recording layers back into stock ones, state kept."""
    cache.layers = [x.stock() if isinstance(x, RecordingSlidingLayer) else x for x in cache.layers]


def columns_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of every column that this layer still has whole, oldest first: all, or since recording began."""
    if isinstance(layer, RecordingSlidingLayer):
        return layer.all_recorded()
    return layer.keys, layer.values


def fill(layer: Any, keys: torch.Tensor, values: torch.Tensor, columns: int) -> None:
    """Put a layer into the state it would have after processing `columns` columns.

    `keys` and `values` hold all of them, or for a sliding layer the last `min(columns, sliding_window − 1)`.
    """
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns
