"""Layout proof: verifies at start-up that a layout describes the engine's memory, through the engine's own cache-write path.

Shapes do not determine the layout: with 2 kv heads, `[block, slot, 2, 2·dim]` is either K‖V per head or heads per K and V, and
the same engine packs its pages differently on another CPU. So the engine writes known patterns, in which no two elements are
equal, into scratch slots, and `gather` must read exactly these; then `scatter` writes others, and the engine (if it can)
reads them back. An unproven layout is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lmcache.layout import BoundKV, ObjectLayout, gather, scatter
from lmcache.layout.bound import BoundGroup
from lmcache.layout.objects import canonical_views
from lmcache.layout.slots import validate_slots
from lmcache.spec import KVSpec, Plane

Values = dict[str, torch.Tensor]
"""Plane name → values `(tokens, heads, elems)` in the plane's dtype."""

Write = Callable[[int, int, torch.Tensor, Values], None]
"""(group, local layer, slots, values): stores the tokens' KV as the engine does in a forward pass."""

Read = Callable[[int, int, torch.Tensor], Mapping[str, torch.Tensor]]
"""(group, local layer, slots) → values, as read by the engine's attention."""

_SNAPSHOT_BYTES = 256 << 20


@dataclass(frozen=True)
class Proof:
    """Result of a layout proof: `reason` is the first contradiction found. True in a boolean context if proven."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def prove(
    kv: BoundKV,
    spec: KVSpec,
    write: Write,
    scratch_slots: torch.Tensor | Mapping[int, torch.Tensor],
    *,
    read: Read | None = None,
    layers: Iterable[int] | None = None,
) -> Proof:
    """Verifies the layout of `kv` against the engine's own writes and reads.

    Never raises: an exception in the engine's functions fails the proof. `scatter` runs only after `gather` is proven. The
    content of the scratch slots is overwritten.

    Args:
        kv: the engine's memory under the layout to verify.
        spec: the spec that `kv` is bound to.
        write: the engine's cache-write path.
        scratch_slots: unused slots, per group if there are several: all slots of at least two pages (in a pool without
            pages, at least four slots).
        read: the engine's read path, if it has one.
        layers: local layers to test, default all.
    """
    try:
        for index in range(len(spec.groups)):
            slots = scratch_slots if isinstance(scratch_slots, torch.Tensor) else scratch_slots[index]
            reason = _prove_group(kv, index, write, read, slots, layers)
            if reason:
                return Proof(False, f"group {spec.groups[index].name!r}: {reason}")
    except Exception as error:  # the engine's functions may raise anything
        return Proof(False, f"{type(error).__name__}: {error}")
    return Proof(True)


def _prove_group(
    kv: BoundKV, index: int, write: Write, read: Read | None, slots: torch.Tensor, layers: Iterable[int] | None
) -> str:
    bound = kv.groups[index]
    which = sorted(set(range(bound.layers) if layers is None else layers))
    slots = validate_slots(slots, bound.num_slots, len(slots), unique=True)
    slots = slots.cpu()
    short = _too_few(bound, slots)
    if short:
        return short
    target = slots.to(kv.device)
    patterns = _Patterns(bound, len(slots), which)
    for number in range(patterns.passes):
        wanted = patterns.values(number, kv.device)
        for layer in which:
            write(index, layer, target, {name: planes[layer] for name, planes in wanted.items()})
        wrong = _difference(_gathered(kv, index, slots, which), wanted, "gather reads", "the engine wrote")
        if wrong:
            return wrong
    return _prove_scatter(kv, index, read, slots, patterns)


def _prove_scatter(kv: BoundKV, index: int, read: Read | None, slots: torch.Tensor, patterns: _Patterns) -> str:
    """Overwrites every other scratch slot and checks that all other memory stays unchanged. Returns the reason of failure."""
    bound, which = kv.groups[index], patterns.layers
    canonical = ObjectLayout.canonical(kv.spec, index, len(slots))
    before = _snapshot(bound)
    old = _gathered(kv, index, slots, which)
    new = patterns.values(patterns.passes, kv.device)
    chosen = torch.arange(len(slots)) % 2 == 0
    buffer = torch.zeros(canonical.nbytes, dtype=torch.uint8, device=kv.device)
    parts = canonical_views(buffer, canonical)
    for name, by_layer in new.items():
        for layer, values in by_layer.items():
            parts[name][layer].copy_(_bits(values))
    for layer in which:
        scatter([buffer], canonical, kv, index, torch.where(chosen, slots, -1), slice(layer, layer + 1))
    keep = chosen.to(kv.device)[:, None, None]
    wanted = {n: {i: _choose(keep, new[n][i], old[n][i]) for i in which} for n in new}
    wrong = _difference(_gathered(kv, index, slots, which), wanted, "after scatter, gather reads", "it should be")
    if wrong:
        return wrong
    if read is not None:
        target = slots.to(kv.device)
        found = {layer: read(index, layer, target) for layer in which}
        seen = {name: {layer: found[layer][name] for layer in which} for name in new}
        wrong = _difference(seen, wanted, "after scatter, the engine reads", "it should be")
        if wrong:
            return wrong
    stray = _stray_bytes(bound, before, slots[chosen], which)
    return f"scatter changed {stray} bytes outside of the slots it was given" if stray else ""


def _too_few(bound: BoundGroup, slots: torch.Tensor) -> str:
    """Returns why these scratch slots are not sufficient for a proof, or an empty string."""
    block = bound.block_tokens
    if bool((slots < 0).any()):
        return "scratch slots must be real slots, not −1"
    if bound.runs:
        need = min(4, bound.num_slots)
        return "" if len(slots) >= need else f"{len(slots)} scratch slots are too few, pass at least {need}"
    pages, offsets = torch.unique(slots // block).numel(), torch.unique(slots % block).numel()
    if pages < min(2, bound.pages) or offsets < block or len(slots) < 2:
        return (
            f"{len(slots)} scratch slots cover {pages} pages and {offsets} of {block} places in a page: "
            "pass all slots of at least two pages"
        )
    return ""


class _Patterns:
    """Values for every (plane, layer, token, head, element), such that no two elements are equal in all passes.

    The index of an element is encoded in base M, one digit per pass, where M is the number of safe values of the dtype:
    finite, normal and positive, so that no write path rounds, flushes or canonicalises them.
    """

    def __init__(self, bound: BoundGroup, tokens: int, layers: list[int]) -> None:
        self.layers = layers
        self._shapes = {p.name: (tokens, bound.heads, p.elems) for p in bound.planes}
        self._alphabets = {p.name: _alphabet(p) for p in bound.planes}
        self._total = sum(tokens * bound.heads * p.elems for p in bound.planes) * len(layers)
        base = min(len(a) for a in self._alphabets.values())
        self._base = base
        self.passes = 1
        while base**self.passes < self._total:
            self.passes += 1

    def values(self, number: int, device: torch.device) -> dict[str, dict[int, torch.Tensor]]:
        """Returns plane → layer → values of one pass. Pass `passes` is an extra one that differs from pass 0 everywhere."""
        out: dict[str, dict[int, torch.Tensor]] = {}
        start = 0
        for name, shape in self._shapes.items():
            size = shape[0] * shape[1] * shape[2]
            out[name] = {}
            for layer in self.layers:
                index = torch.arange(start, start + size)
                start += size
                last = number == self.passes
                digit = (index + 1) % self._base if last else index // self._base**number % self._base
                out[name][layer] = self._alphabets[name][digit].view(shape).to(device)
        return out


def _alphabet(plane: Plane) -> torch.Tensor:
    """Returns the values of a dtype that every correct write path preserves."""
    dtype = plane.torch_dtype
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if dtype.is_complex:
        real = torch.arange(1, 1 << 12, dtype=torch.float32)
        return torch.complex(real, -real).to(dtype)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.arange(1, min(info.max, 1 << 20)).to(dtype)
    if dtype.itemsize == 1:
        every = torch.arange(256).to(torch.uint8).view(dtype)
        real = every.to(torch.float32)
        safe = torch.isfinite(real) & (real >= torch.finfo(dtype).tiny) & (real <= torch.finfo(dtype).max)
        return every.view(torch.uint8)[safe].view(dtype)
    one = torch.ones(1, dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    count = 1 << (11 if dtype.itemsize == 2 else 20)
    return (one.view(bits) + torch.arange(count, dtype=bits)).view(dtype)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Views values as bytes: `(…, last dimension × itemsize)`."""
    return values.contiguous().view(torch.uint8)


def _choose(mask: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, _bits(yes), _bits(no)).view(yes.dtype)


def _gathered(kv: BoundKV, index: int, slots: torch.Tensor, layers: list[int]) -> dict[str, dict[int, torch.Tensor]]:
    canonical = ObjectLayout.canonical(kv.spec, index, len(slots))
    buffer = torch.zeros(canonical.nbytes, dtype=torch.uint8, device=kv.device)
    for layer in layers:
        gather(kv, index, slots, [buffer], canonical, slice(layer, layer + 1))
    dtypes = {p.name: p.torch_dtype for p in kv.groups[index].planes}
    parts = canonical_views(buffer, canonical)
    return {name: {i: part[i].clone().view(dtypes[name]) for i in layers} for name, part in parts.items()}


def _difference(
    found: Mapping[str, Mapping[int, torch.Tensor]],
    wanted: Mapping[str, Mapping[int, torch.Tensor]],
    left: str,
    right: str,
) -> str:
    """Describes the first element that differs in any bit; empty if there is none."""
    for name, by_layer in wanted.items():
        for layer, values in by_layer.items():
            seen = found[name][layer]
            if seen.shape != values.shape or seen.element_size() != values.element_size():
                return f"plane {name!r}, layer {layer}: {left} {seen.dtype} {tuple(seen.shape)}, {right} {tuple(values.shape)}"
            wrong = (_bits(seen) != _bits(values)).view(*values.shape, -1).any(dim=-1)
            if wrong.any():
                token, head, elem = (int(i) for i in wrong.nonzero()[0])
                return (
                    f"plane {name!r}, layer {layer}, token {token}, head {head}, element {elem}: {left} "
                    f"{seen[token, head, elem].item()}, {right} {values[token, head, elem].item()} "
                    f"({int(wrong.sum())} of {wrong.numel()} elements differ)"
                )
    return ""


def _snapshot(bound: BoundGroup) -> tuple[torch.Tensor, ...] | None:
    """Copies all of the engine's memory, or returns None if it is too large."""
    if any(tensor.untyped_storage().nbytes() > _SNAPSHOT_BYTES for tensor in bound.owners):
        return None
    return tuple(tensor.clone() for tensor in bound.owners)


def _stray_bytes(
    bound: BoundGroup, before: tuple[torch.Tensor, ...] | None, slots: torch.Tensor, layers: Iterable[int]
) -> int:
    """Returns the number of bytes that changed outside of `slots`; 0 without a snapshot."""
    if before is None:
        return 0
    changed = [new != old for new, old in zip(bound.owners, before, strict=True)]
    pages, inside = (slots // bound.block_tokens).numpy(), (slots % bound.block_tokens).numpy()
    for by_layer in bound.addresses:
        for layer in layers:
            a = by_layer[layer]
            token = pages * a.page + a.T[inside]
            head = np.arange(bound.heads) * a.head
            offset = (token[:, None, None] + head[:, None] + a.E).reshape(-1, 1) + np.arange(a.itemsize)
            start = bound.storages[a.storage].data_ptr() + a.base
            for owner, mask in zip(bound.owners, changed, strict=True):
                if owner.data_ptr() <= start < owner.data_ptr() + owner.nbytes:
                    mask[torch.from_numpy(offset.reshape(-1) + start - owner.data_ptr()).to(mask.device)] = False
    return sum(int(torch.count_nonzero(mask)) for mask in changed)
