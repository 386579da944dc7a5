"""Identifies the weights in memory: cache keys contain a digest of them, not the path they were loaded from.

A model may be quantised, merged with a LoRA, or trained further after loading, all under one path. So its identity is a
digest of every byte of the current parameters and buffers, with shapes and dtypes, computed on all cores. The configuration
is the spec's `meaning`. A cheap `glance` before each call detects changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from lmcache_hf.compat import unwrapped

_PIECE = 256 << 20  # bytes copied from a device at a time
_GLANCE_ELEMENTS = 4


class Glance(NamedTuple):
    """A cheap fingerprint, taken before each call: tensors, in-place versions, sampled values, adapters and hooks."""

    stamps: tuple[tuple[int, int, int], ...]
    samples: bytes
    switches: str


def glance(model: Any) -> Glance:
    """Takes a `Glance`, about 2 ms for 300 parameters. Samples every tensor, for `.data` writes do not bump version counters."""
    tensors = [tensor for _, tensor in _tensors(model)]
    stamps = tuple((id(t), t._version if not t.is_inference() else 0, t.data_ptr()) for t in tensors)
    return Glance(stamps, _samples(tensors), _switches(model))


def weights_digest(model: Any) -> str:
    """Returns a hex digest of every byte of all parameters and buffers, of active adapters and of inner hooks."""
    digest = blake3(b"lmcache hf weights 2", max_threads=blake3.AUTO)
    for part in (type(unwrapped(model)).__qualname__, _switches(model)):
        _feed(digest, part.encode())
    for name, tensor in _tensors(model):
        _feed(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _feed_bytes(digest, tensor)
    return str(digest.hexdigest(32))


def is_changed(model: Any) -> bool:
    """Whether adapters or hooks inside the model change what a `model_identity`, which names the weights, would say."""
    return bool(_switches(model))


def _feed(digest: Any, field: bytes) -> None:
    digest.update(len(field).to_bytes(8, "little"))
    digest.update(field)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    inner = unwrapped(model)
    for source in (inner.named_parameters(), inner.named_buffers()):
        for name, tensor in source:
            if tensor.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device: its weights are offloaded or not loaded")
            yield name, tensor


@torch.no_grad()
def _feed_bytes(digest: Any, tensor: torch.Tensor) -> None:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, raw.numel(), _PIECE):
        digest.update(raw[start : start + _PIECE].cpu().numpy())


@torch.no_grad()
def _samples(tensors: Iterable[torch.Tensor], count: int = _GLANCE_ELEMENTS) -> bytes:
    """Returns about `count` elements spread over each tensor, copied to the CPU once per dtype and device."""
    parts: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
            step = max(1, (flat.numel() - 1) // count)
            parts.setdefault((tensor.dtype, tensor.device), []).append(flat[::step][: count + 1])
    return b"".join(torch.cat(found).cpu().view(torch.uint8).numpy().tobytes() for found in parts.values())


def _switches(model: Any) -> str:
    """Lists adapter settings and hooks, which change keys and values without changing a tensor.

    What a hook on an inner module does is unknown, so KV computed with it is only reused in this process, while the same hooks
    are installed. Hooks on the whole model or its output head do not affect keys or values and are ignored.
    """
    inner = unwrapped(model)
    outer = {id(inner), id(inner.get_output_embeddings())}
    found = []
    for name, module in inner.named_modules():
        if (module._forward_hooks or module._forward_pre_hooks) and id(module) not in outer:
            hooks = [id(h) for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
            found.append(f"hooks {os.getpid()} {name} {hooks}")
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple)) and hasattr(module, "scaling"):
            off, merged = getattr(module, "disable_adapters", False), getattr(module, "merged_adapters", ())
            found.append(f"adapters {name} {list(active)} {module.scaling} {off} {list(merged)}")
    return "\n".join(found)
