"""How vLLM arranges its pages: candidate layouts, and a proof through vLLM's own cache-write path of which one is correct.

Shapes are not sufficient. Each layer is a tensor `(block, head, slot, K‖V)` with strides, which describes the memory on a GPU;
the CPU backend packs K and V of a block in an order that depends on its instruction set, under the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lmcache.errors import LMCacheError
from lmcache.layout import Layout, PagedKV
from lmcache.layout.proof import Values, prove
from lmcache.spec import KVSpec
from lmcache_vllm.compat import UnsupportedError
from lmcache_vllm.geometry import layer_order

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

_INSIDE_A_BLOCK = {
    "vec": {"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"},
    "amx": {"k": "block head (kv slot/16 dim/2 slot%16 dim%2)", "v": "block head (kv dim/16 slot/2 dim%16 slot%2)"},
}
"""Layouts of the CPU backend by instruction set: all bytes of one head in a block are one dimension."""

_LATENT = "block one slot latent"
_PACKED = "block head slot (kv dim)"
_SCRATCH = (1, 2)
"""Blocks that the proof overwrites: unused at start-up (block 0 is vLLM's null block)."""


def prove_layout(
    spec: KVSpec, config: KVCacheConfig, caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any]
) -> tuple[PagedKV, str]:
    """Returns the live KV with the layout that vLLM actually writes, and that layout's name.

    Raises:
        UnsupportedError: no known layout is the one that vLLM writes; the message has each candidate's contradiction.
    """
    blocks = int(config.num_blocks)
    if blocks < 3:
        raise UnsupportedError(f"{blocks} KV blocks leave no room for a layout proof")
    order = [layer_order(group) for group in config.kv_cache_groups]
    sizes = [int(group.kv_cache_spec.block_size) for group in config.kv_cache_groups]
    tensors = [[_by_block(caches[name], blocks) for name in names] for names in order]
    scratch = {g: torch.cat([torch.arange(b * n, (b + 1) * n) for b in _SCRATCH]) for g, n in enumerate(sizes)}

    def write(group: int, layer: int, slots: torch.Tensor, values: Values) -> None:
        name = order[group][layer]
        write_as_vllm(layers[name], caches[name], slots, values)

    reasons = []
    saved = [[tensor[list(_SCRATCH)].clone() for tensor in group] for group in tensors]
    try:
        for label, kv in _candidates(spec, tensors, sizes):
            try:
                bound = kv.bind(spec)
            except LMCacheError as error:
                reasons.append(f"{label}: {error}")
                continue
            proof = prove(bound, spec, write, scratch)
            if proof:
                return kv, label
            reasons.append(f"{label}: {proof.reason}")
    finally:
        for group, kept in zip(tensors, saved, strict=True):
            for tensor, rows in zip(group, kept, strict=True):
                tensor[list(_SCRATCH)] = rows
    raise UnsupportedError("no known layout is what vLLM writes here. " + "; ".join(reasons))


def _candidates(spec: KVSpec, tensors: list[list[torch.Tensor]], sizes: list[int]) -> list[tuple[str, PagedKV]]:
    if all(len(group.planes) == 1 for group in spec.groups):
        layouts = {g: Layout.parse(_LATENT, block_tokens=n) for g, n in enumerate(sizes)}
        return [("latent", PagedKV(dict(enumerate(tensors)), layouts))]
    packed = {g: Layout.parse(_PACKED, block_tokens=n) for g, n in enumerate(sizes)}
    found = [("packed", PagedKV(dict(enumerate(tensors)), packed))]
    try:
        flat = {g: [tensor.view(*tensor.shape[:2], -1) for tensor in group] for g, group in enumerate(tensors)}
    except RuntimeError:  # slots of a head are not contiguous: not the CPU backend
        return found
    for label, axes in _INSIDE_A_BLOCK.items():
        try:
            layouts = {g: Layout.parse(axes, block_tokens=n) for g, n in enumerate(sizes)}
        except LMCacheError:  # the block size is not a multiple of the layout's tile
            continue
        found.append((label, PagedKV(dict(flat), layouts)))
    return found


def _by_block(cache: torch.Tensor, blocks: int) -> torch.Tensor:
    """Returns a tensor `(block, head, slot, content)`; dimension 0 are the blocks of the block table."""
    if cache.dim() == 3:
        cache = cache.unsqueeze(1)
    if cache.dim() != 4 or cache.shape[0] != blocks:
        raise UnsupportedError(
            f"a KV tensor has the shape {tuple(cache.shape)}, expected ({blocks} blocks, heads, slots, content); kernel "
            "blocks smaller than the block table's are not supported"
        )
    return cache


def write_as_vllm(layer: Any, cache: torch.Tensor, slots: torch.Tensor, values: Values) -> None:
    """Writes tokens to the KV cache with the function that vLLM's forward pass uses."""
    slots = slots.to(torch.int64)
    if "latent" in values:
        latent = values["latent"][:, 0]
        rank = int(layer.impl.kv_lora_rank)
        scale = getattr(layer, "_k_scale", torch.ones(1))
        layer.impl.do_kv_cache_update(
            latent[:, :rank].contiguous(),
            latent[:, rank:].unsqueeze(1).contiguous(),
            layer.kv_cache,
            slots,
            layer.kv_cache_dtype,
            scale,
        )
        return
    layer.impl.do_kv_cache_update(layer, values["k"].contiguous(), values["v"].contiguous(), cache, slots)
