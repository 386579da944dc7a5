"""Derives the `KVSpec` of vLLM's KV cache: groups, planes, windows, the rectangle of this rank."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import vllm
from blake3 import blake3

from lmcache.errors import SpecError
from lmcache.identity import model_identity
from lmcache.numerics import environment_switches, torch_switches
from lmcache.spec import ALL, HitRule, KVSpec, LayerGroup, Numerics, Plane, Rect, dtype_name, host_isa, trailing
from lmcache_vllm import configuration
from lmcache_vllm.compat import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_NUMBER = re.compile(r"\.(\d+)\.")


def rounded_chunk(config: KVCacheConfig, chunk_tokens: int) -> int:
    """Returns `chunk_tokens`, rounded up to a multiple of every group's block size."""
    block = lcm(*(int(group.kv_cache_spec.block_size) for group in config.kv_cache_groups))
    return -(-chunk_tokens // block) * block


def spec_of(
    vllm_config: VllmConfig,
    kv_config: KVCacheConfig,
    layers: Mapping[str, Any],
    *,
    rank: int,
    ranks: int,
    identity: str,
    measured: tuple[tuple[str, str], ...] = (),
) -> KVSpec:
    """Returns the spec of one tensor-parallel rank.

    Args:
        vllm_config, kv_config: as vLLM passes them to a connector.
        layers: layer name → attention module.
        rank, ranks: of the tensor-parallel group.
        identity: identity of the weights, see `identity_of`.
        measured: how this worker rounds, see `lmcache_vllm.probe`.

    Raises:
        UnsupportedError: a group is of a kind that this adapter cannot cache.
    """
    groups, rects = [], []
    for number, group in enumerate(kv_config.kv_cache_groups):
        made, heads = _group(number, group, vllm_config, rank, ranks)
        groups.append(made)
        rects.append(Rect((0, max(made.layers) + 1), heads))
    meaning = configuration.meaning(vllm_config, _scales(layers))
    spec = KVSpec(identity, tuple(groups), tuple(rects), numerics_of(vllm_config, layers, ranks, measured), meaning)
    spec.validate()
    return spec


def _group(
    number: int, group: Any, vllm_config: VllmConfig, rank: int, ranks: int
) -> tuple[LayerGroup, tuple[int, int]]:
    from vllm.v1.kv_cache_interface import (
        AttentionSpec,
        FullAttentionSpec,
        MLAAttentionSpec,
        SlidingWindowMLASpec,
        SlidingWindowSpec,
    )

    spec = group.kv_cache_spec
    kind = type(spec).__name__
    if not isinstance(spec, AttentionSpec):
        raise UnsupportedError(f"group {number} is a {kind}: only attention layers can be cached yet")
    if not isinstance(spec, (FullAttentionSpec, SlidingWindowSpec)) or getattr(spec, "attention_chunk_size", None):
        raise UnsupportedError(f"group {number} is a {kind}: no rule is known for when its KV may be reused")
    if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "non_causal", False):
        raise UnsupportedError(f"group {number} ({kind}) compresses tokens or looks ahead: not supported")
    if getattr(spec, "kv_quant_mode", 0) not in (0, 1):
        raise UnsupportedError(f"group {number} keeps scales beside its KV ({spec.kv_quant_mode!r}): not supported yet")
    layers = sorted(layer_number(name) for name in group.layer_names)
    rule: HitRule = ALL
    window = int(getattr(spec, "sliding_window", None) or 0)
    if isinstance(spec, SlidingWindowSpec):
        if window > 1:
            rule = trailing(window - 1)
        name = "sliding"
    else:
        name = "full"
    dtype = dtype_name(_plane_dtype(spec.dtype, vllm_config.cache_config.cache_dtype))
    if isinstance(spec, (MLAAttentionSpec, SlidingWindowMLASpec)):
        planes: tuple[Plane, ...] = (Plane("latent", dtype, int(spec.head_size)),)
        return LayerGroup(f"{name}{number}", tuple(layers), planes, 1, rule), (0, 1)
    v_size = int(getattr(spec, "head_size_v", None) or spec.head_size)
    planes = (Plane("k", dtype, int(spec.head_size)), Plane("v", dtype, v_size))
    local = int(spec.num_kv_heads)
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    if local * ranks == total or ranks == 1:
        heads, all_heads = (rank * local, (rank + 1) * local), local * ranks
    elif local == 1 and ranks % total == 0:  # fewer heads than ranks: adjacent ranks hold the same head
        held = rank // (ranks // total)
        heads, all_heads = (held, held + 1), total
    else:
        raise UnsupportedError(f"group {number}: {local} kv heads on each of {ranks} ranks, the model has {total}")
    return LayerGroup(f"{name}{number}", tuple(layers), planes, all_heads, rule), heads


def _plane_dtype(dtype: torch.dtype, cache_dtype: str) -> torch.dtype:
    """Returns the dtype of the values: vLLM keeps fp8 in uint8 tensors and names the kind of fp8 in `cache_dtype`."""
    if dtype != torch.uint8:
        return dtype
    known = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    if cache_dtype not in known:
        raise UnsupportedError(f"kv-cache dtype {cache_dtype!r} keeps opaque bytes: not supported")
    return known[cache_dtype]


def layer_number(name: str) -> int:
    """Returns the layer's index in the model, from its module path.

    Raises:
        UnsupportedError: the path contains no number, or several.
    """
    found = _NUMBER.findall(f".{name}.")
    if len(found) != 1:
        raise UnsupportedError(f"layer {name!r} has no single number in its name")
    return int(found[0])


def numerics_of(
    config: VllmConfig, layers: Mapping[str, Any], ranks: int, measured: tuple[tuple[str, str], ...] = ()
) -> Numerics:
    """Returns everything besides weights and tokens that determines the bits of KV in this worker."""
    backends = sorted({_backend(layer) for layer in layers.values() if hasattr(layer, "impl")})
    device = config.device_config.device_type
    extra = [
        ("kv_cache_dtype", str(config.cache_config.cache_dtype)),
        ("compilation", f"{config.compilation_config.mode} eager={config.model_config.enforce_eager}"),
    ]
    extra += [("configuration", configuration.rounding(config)), *torch_switches(device), *measured]
    if device == "cpu":
        isa = host_isa()
    elif device == "cuda":
        isa = f"{torch.cuda.get_device_name()} sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    else:
        isa = str(device)
    if device != "cpu":
        isa = " ".join([isa, *(f"{name}={value}" for name, value in environment_switches())])
    return Numerics(
        engine="vllm",
        engine_version=f"{vllm.__version__} torch {torch.__version__}",
        attention_backend=", ".join(backends),
        isa=isa,
        dtype=dtype_name(config.model_config.dtype),
        quantization=str(config.model_config.quantization or ""),
        tp=ranks,
        pp=1,
        extra=tuple(extra),
    )


def _backend(layer: Any) -> str:
    name = type(layer.impl).__name__
    isa = getattr(layer, "isa", None)
    return f"{name}/{isa}" if isa else name


def _scales(layers: Mapping[str, Any]) -> str:
    """A digest of fixed quantisation scales, or empty where all are 1. They scale values, so they are meaning, not rounding."""
    found = [
        (name, float(getattr(layer, "_k_scale_float", 1.0)), float(getattr(layer, "_v_scale_float", 1.0)))
        for name, layer in sorted(layers.items())
    ]
    if all(k == 1.0 and v == 1.0 for _, k, v in found):
        return ""
    return str(blake3(repr(found).encode()).hexdigest())


def identity_of(config: VllmConfig, given: str | None, fingerprint: Any) -> str:
    """What the weights are. The model's configuration is the spec's `meaning`, also where the identity is given."""
    model = config.model_config
    if given:
        return given
    if str(getattr(config.load_config, "load_format", "")) == "dummy":
        raise UnsupportedError(
            "load_format=dummy: random weights have no identity; set model_identity to give them one"
        )
    try:
        identity = _content(config, model, fingerprint)
        draft = getattr(getattr(config, "speculative_config", None), "draft_model_config", None)
        if draft is not None and draft.model != model.model:
            identity += f" draft {_content(config, draft, fingerprint)}"
    except SpecError as error:
        raise UnsupportedError(str(error)) from error
    return identity


def _content(config: VllmConfig, model: Any, fingerprint: Any) -> str:
    from vllm import envs

    if envs.VLLM_USE_MODELSCOPE and not os.path.exists(model.model):
        raise SpecError("VLLM_USE_MODELSCOPE: where its weights lie is unknown; pass a folder, or set model_identity")
    name = str(getattr(model, "model_weights", "") or model.model)
    return model_identity(
        name,
        fingerprint=fingerprint,
        revision=model.revision,
        hub_cache=getattr(config.load_config, "download_dir", None),
    )


def parts_of(spec: KVSpec) -> dict[str, str]:
    """Returns short digests of what decides names. Where a restart finds nothing, they tell what has changed."""
    numerics = blake3(msgspec.json.encode(spec.numerics)).hexdigest(4)
    return {"weights": blake3(spec.model.encode()).hexdigest(4), "meaning": spec.meaning[:8], "rounding": str(numerics)}


def layer_order(group: Any) -> Sequence[str]:
    """Returns the layer names of a vLLM group, in the order of the spec's layers."""
    return sorted(group.layer_names, key=layer_number)
