"""Measures the shape of a model's KV cache with a few tiny `generate` calls at start-up, and proves that reuse works.

The configuration lists windows and layer types, but not what an attention class actually caches (latents, shared layers,
unequal head sizes). So a four-token prompt is run once and the resulting cache is measured. The proof: KV of a prompt's first
half, computed with a *different* continuation, must give the logits of a plain run. This catches models whose keys depend on
later tokens (bidirectional prefixes) and models whose positions do not follow from a filled cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from lmcache.adapter import UnsupportedError
from lmcache.numerics import environment_switches, meaning_of, measured, torch_switches
from lmcache.spec import ALL, KVSpec, LayerGroup, Numerics, Plane, dtype_name, host_isa, trailing
from lmcache_hf import compat


@dataclass(frozen=True)
class GroupShape:
    """Shape of the tensors of one layer group, (batch, heads, columns, elems) each.

    Attributes:
        layers: indices into the cache's list of layers.
        window: number of previous columns that a sliding layer keeps, 0 = all.
        heads: number of kv heads.
        k_elems, v_elems: elements per head.
        dtype: of keys and values.
    """

    layers: tuple[int, ...]
    window: int
    heads: int
    k_elems: int
    v_elems: int
    dtype: torch.dtype

    @property
    def elems(self) -> tuple[int, int]:
        """Elements per head of keys and of values."""
        return self.k_elems, self.v_elems


@dataclass(frozen=True)
class Geometry:
    """All layer groups of a model, on one device."""

    groups: tuple[GroupShape, ...]
    device: torch.device

    @property
    def slides(self) -> bool:
        """Whether any group has a sliding window."""
        return any(group.window for group in self.groups)

    def spec(self, model: str, numerics: Numerics, meaning: str) -> KVSpec:
        """Returns the `KVSpec` of the whole model on one rank."""
        groups = []
        for shape in self.groups:
            name = dtype_name(shape.dtype)
            planes = (Plane("k", name, shape.k_elems), Plane("v", name, shape.v_elems))
            label, rule = ("sliding", trailing(shape.window)) if shape.window else ("full", ALL)
            groups.append(LayerGroup(label, shape.layers, planes, shape.heads, rule))
        return KVSpec.of_groups(model, groups, numerics, meaning)


def numerics_of(model: Any) -> Numerics:
    """Returns what determines how this process rounds KV: versions, dtype, attention, torch's and the environment's switches.

    What `probe` measures is added when the engine is opened.
    """
    config = compat.unwrapped(model).config
    device = model.device
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        isa = f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    else:
        isa = device.type
    isa = host_isa() if device.type == "cpu" else " ".join([isa, *(f"{k}={v}" for k, v in environment_switches())])
    extra = [*torch_switches(device.type), *_implementations(config)]
    if compat.unwrapped(model) is not model:
        extra.append(("compiled", "torch.compile"))
    return Numerics(
        engine="transformers",
        engine_version=f"{transformers.__version__} torch {torch.__version__}",
        attention_backend=str(getattr(config, "_attn_implementation", "")),
        isa=isa,
        dtype=dtype_name(model.dtype),
        quantization=str(getattr(getattr(config, "quantization_config", None), "quant_method", "") or ""),
        extra=tuple(extra),
    )


def _implementations(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Returns the rounding fields of a configuration and of those inside it, which `meaning_of` leaves out."""
    found = []
    for name in ("_attn_implementation", "_experts_implementation", "dtype"):
        value = getattr(config, name, None)
        if value is not None:
            found.append((prefix + name.strip("_"), str(value)))
    for name in sorted(getattr(config, "sub_configs", None) or ()):
        inner = getattr(config, name, None)
        if inner is not None and inner is not config:
            found += _implementations(inner, f"{prefix}{name}.")
    return found


def meaning_of_model(model: Any) -> str:
    """Returns the digest of the model's whole resolved configuration, and of the class that computes with it."""
    inner = compat.unwrapped(model)
    return meaning_of(inner.config.to_dict() | {"architectures": [type(inner).__name__]})


def probe(model: Any) -> str:
    """Returns a digest of the KV that the model computes for a fixed prompt; empty if two runs differ or it cannot be run.

    The model's own matmul and attention run, so this covers what no switch tells: kernels, libraries, processors.
    """
    text = model.config.get_text_config(decoder=True)
    longest = int(getattr(text, "max_position_embeddings", 0) or _PROBE_TOKENS + 1) - 1
    vocabulary = int(text.vocab_size)
    tokens = [(7 + 2654435761 * i) % 2**32 % vocabulary for i in range(max(1, min(_PROBE_TOKENS, longest)))]

    def run() -> list[torch.Tensor]:
        cache = compat.fresh_cache(model)
        _run_prompt(model, tokens, cache)
        layers: list[Any] = cache.layers
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        return measured(run)


_PROBE_TOKENS = 160


def examine(model: Any) -> Geometry:
    """Measures the model's cache and proves that its KV can be reused. Runs `generate` on three four-token prompts.

    Raises:
        UnsupportedError: this model's cache cannot be reused correctly, or reuse could not be proven.
    """
    refuse_by_config(model)
    template = compat.fresh_cache(model)
    if (unknown := compat.unsupported_layer(template)) is not None:
        raise UnsupportedError(f"its cache has an unsupported layer: {unknown}", reason="unsupported_cache")
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    a, b, c, d, e, f = ((vocabulary // 3 + 7 * i) % vocabulary for i in range(6))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        other = compat.fresh_cache(model)
        compat.arm(other, template)
        _run_prompt(model, [a, b, e, f], other)
        geometry = _measure(other, template)
        half = compat.fresh_cache(model)
        for layer, donor in zip(half.layers, other.layers, strict=True):
            keep = min(2, compat.window_of(donor) or 2)
            keys, values = (x[:, :, 2 - keep : 2].clone() for x in compat.columns_of(donor))
            compat.fill(layer, keys, values, 2)
        plain = _run_prompt(model, [a, b, c, d], compat.fresh_cache(model))
        reused = _run_prompt(model, [a, b, c, d], half)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    error = float((plain - reused).abs().max() / plain.std().clamp_min(1e-6))
    if not error <= tolerance:
        raise UnsupportedError(f"reused KV changes its logits by {error:.2g} standard deviations", reason="unproven")
    return geometry


def refuse_by_config(model: Any) -> None:
    """Raises `UnsupportedError` if the configuration alone rules the model out."""
    inner = compat.unwrapped(model)
    if inner.config.is_encoder_decoder:
        raise UnsupportedError(
            "encoder-decoder models keep a second cache for the encoder's output", reason="encoder_decoder"
        )
    if compat.has_own_generate(model):
        raise UnsupportedError(f"{type(inner).__name__} overrides `generate`", reason="custom_generate")
    if not inner._supports_default_dynamic_cache() or "mamba" in type(inner).__name__.lower():
        raise UnsupportedError(
            f"{type(inner).__name__} does not keep its state in a DynamicCache", reason="unsupported_cache"
        )
    if (owner := compat.keeps_positions(inner)) is not None:
        raise UnsupportedError(
            f"{owner} keeps `rope_deltas` of its last call and adds them to the positions of the next one",
            reason="rope",
        )
    if (kind := _rope_by_length(inner.config.to_dict())) is not None:
        raise UnsupportedError(
            f"rotary type {kind!r} makes keys depend on the length of the whole sequence", reason="rope"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized() and getattr(inner, "_tp_size", None):
        raise UnsupportedError("a model sharded over processes is not supported here", reason="tensor_parallel")


def _rope_by_length(config: Any) -> str | None:
    if isinstance(config, dict):
        kind = config.get("rope_type", config.get("type"))
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            return kind
        return next((found for value in config.values() if (found := _rope_by_length(value))), None)
    return None


def _run_prompt(model: Any, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    ids = torch.tensor([list(tokens)], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: torch.Tensor = out.logits[0].float()
    return logits


def _measure(cache: DynamicCache, template: DynamicCache) -> Geometry:
    """Groups the layers of a cache that holds four tokens by shape."""
    found: dict[tuple[Any, ...], list[int]] = {}
    devices = set()
    if not cache.layers or len(cache.layers) != len(template.layers):
        raise UnsupportedError(
            f"its cache has {len(cache.layers)} layers, not {len(template.layers)}", reason="unsupported_cache"
        )
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        window = compat.window_of(layer)
        keys, values = layer.keys, layer.values
        want = min(4, window or 4)
        for tensor in (keys, values):
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
            if len(shape) != 4 or (shape[0], shape[2]) != (1, want):
                detail = f"layer {index} holds {shape} after four tokens, not (1, heads, {want}, dim)"
                raise UnsupportedError(detail, reason="unsupported_cache")
        if keys.shape[1] != values.shape[1] or keys.dtype != values.dtype:
            raise UnsupportedError(
                f"keys and values of layer {index} differ in heads or dtype", reason="unsupported_cache"
            )
        devices.add(keys.device)
        kind = (window, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        found.setdefault(kind, []).append(index)
    if len(devices) > 1:
        raise UnsupportedError(f"its layers are on several devices: {sorted(map(str, devices))}", reason="devices")
    groups = tuple(GroupShape(tuple(members), *kind) for kind, members in found.items())
    return Geometry(groups, devices.pop())
