"""`BoundKV`: an engine's memory compiled to addresses, ready for gather and scatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lmcache.errors import LayoutError
from lmcache.layout.axes import Atom, Axes
from lmcache.layout.objects import ObjectLayout, ObjectPlane
from lmcache.spec import KVSpec, Plane
from lmcache_kernels import Digits, PlaneAddress


@dataclass(frozen=True, eq=False)
class BoundGroup:
    """One layer group, compiled to addresses. `addresses[plane][layer]` index into `storages`, flat uint8 tensors.

    Attributes:
        index: index of the group in the spec.
        storages: what the addresses refer to; on the host possibly one window over all of `owners`.
        owners: the memory as it was allocated.
        heads: local kv heads.
        pages, block_tokens: pages of the pool, and tokens per page.
        axes: axes of each plane.
        runs: the token axis has no pages (a pool of tokens, or a page per sequence), so that an object is a run of tokens
            rather than a list of pages.
        plans: compiled copies, kept by `lmcache.layout.plan`.
        natives: tokens per object → native layout.
    """

    index: int
    planes: tuple[Plane, ...]
    addresses: tuple[tuple[PlaneAddress, ...], ...]
    storages: tuple[torch.Tensor, ...]
    owners: tuple[torch.Tensor, ...]
    heads: int
    pages: int
    block_tokens: int
    axes: tuple[Axes, ...]
    runs: bool
    plans: dict[object, Any] = field(default_factory=dict, repr=False)
    natives: dict[int, ObjectLayout] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> int:
        """Local layers of the group."""
        return len(self.addresses[0])

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self.pages * self.block_tokens


@dataclass(frozen=True, eq=False)
class BoundKV:
    """Engine tensors, checked against a spec and compiled to addresses. Created by `PagedKV.bind`."""

    spec: KVSpec
    groups: tuple[BoundGroup, ...]
    device: torch.device

    def num_slots(self, group: int = 0) -> int:
        """Slots of the group's pool; slot = block × block_tokens + offset."""
        return self.groups[group].num_slots

    def block_tokens(self, group: int = 0) -> int:
        """Tokens per page of the group."""
        return self.groups[group].block_tokens

    def native(self, group: int, tokens: int) -> ObjectLayout:
        """Returns the object layout that has the order of this engine's pages, for objects of `tokens` tokens.

        Canonical if that is the engine's own order, or if `tokens` is not a multiple of the page size.
        """
        bound = self.groups[group]
        found = bound.natives.get(tokens)
        if found is None:
            found = bound.natives.setdefault(tokens, _native_layout(self.spec, bound, tokens))
        return found


# ---------------------------------------------------------------- native layout: the order of an engine's own pages

_Order = list[tuple[int, Atom]]
"""(stride in bytes, atom) of the axes of a page, by descending stride."""

_OUTERMOST = 1 << 62


def _native_layout(spec: KVSpec, bound: BoundGroup, tokens: int) -> ObjectLayout:
    """Page order without gaps: layer, page, then the axes of the page by descending stride. Pages are copied whole."""
    canonical = ObjectLayout.canonical(spec, bound.index, tokens)
    paged = not bound.runs and bound.block_tokens > 1
    if paged and tokens % bound.block_tokens:
        return canonical
    if bound.runs and any(len(layers[0].slot) > 1 for layers in bound.addresses):
        return canonical
    orders = [_order(bound, i, tokens, paged) for i in range(len(bound.planes))]
    texts = _interleaved(bound, orders, paged) or [" ".join(str(atom) for _, atom in order) for order in orders]
    head, block = ("layer block", bound.block_tokens) if paged else ("layer", tokens)
    planes = (
        ObjectPlane(p.name, p.dtype, p.elems, f"{head} {text}", block)
        for p, text in zip(bound.planes, texts, strict=True)
    )
    try:
        native = ObjectLayout(tuple(planes), canonical.layers, canonical.heads, tokens, "native").checked()
    except LayoutError:  # an order that axis strings cannot express
        return canonical
    return canonical if native.signature == canonical.signature else native


def _order(bound: BoundGroup, plane: int, tokens: int, paged: bool) -> _Order:
    address, axes = bound.addresses[plane][0], bound.axes[plane]
    slot = address.slot if paged else ((tokens, address.slot[0][1] if address.slot else address.page),)
    heads = ((bound.heads, address.head),) if "head" in axes.names else ()
    atoms = [
        (size, stride, atom)
        for digits, name in ((slot, "slot"), (heads, "head"), (address.elem, "dim"))
        for size, stride, atom in _atoms(name, digits)
    ]
    # An unsplit axis of one position has no meaningful stride: it becomes outermost.
    strided = [(stride if size > 1 or atom.op else _OUTERMOST, atom) for size, stride, atom in atoms]
    return sorted(strided, key=lambda a: -a[0])


def _atoms(name: str, digits: Digits) -> list[tuple[int, int, Atom]]:
    """(size, stride, atom) of each digit of an axis."""
    if len(digits) < 2:
        return [(size, stride, Atom(name)) for size, stride in digits]
    (quotients, major), (factor, minor) = digits
    return [(quotients, major, Atom(name, "/", factor)), (factor, minor, Atom(name, "%", factor))]


def _interleaved(bound: BoundGroup, orders: Sequence[_Order], paged: bool) -> list[str] | None:
    """Axes of planes that are interleaved within a page, as in `(kv dim)`; None if the planes are separate."""
    if len(orders) < 2 or any("kv" not in axes.names for axes in bound.axes):
        return None
    gap = bound.addresses[1][0].base - bound.addresses[0][0].base
    cut = sum(stride > gap for stride, _ in orders[0])
    outer = [atom for _, atom in orders[0][:cut]]
    separate = gap >= bound.addresses[0][0].page if paged else not outer
    if gap <= 0 or separate or any([atom for _, atom in order[:cut]] != outer for order in orders):
        return None
    inner = [" ".join(str(atom) for _, atom in order[cut:]) for order in orders]
    return [" ".join([*map(str, outer), f"(kv {text})" if text else "kv"]) for text in inner]
