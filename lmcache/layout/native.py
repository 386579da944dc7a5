"""The dense arrangement an engine's own pages have: what DRAM objects look like, so that pages move whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache.errors import LayoutError
from lmcache.layout.axes import Atom
from lmcache.layout.objects import ObjectLayout, ObjectPlane
from lmcache.spec import KVSpec
from lmcache_kernels import Digits

if TYPE_CHECKING:
    from lmcache.layout.bound import BoundGroup


def native_layout(spec: KVSpec, bound: BoundGroup, tokens: int) -> ObjectLayout:
    """Page order made dense: layer, page, then the page's axes by descending stride."""
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
    except LayoutError:  # an order that no axis string can say
        return canonical
    return canonical if native.signature == canonical.signature else native


_Order = list[tuple[int, Atom]]
"""(stride in bytes, atom) of a page's axes, by descending stride."""

_OUTSIDE = 1 << 62


def _order(bound: BoundGroup, plane: int, tokens: int, paged: bool) -> _Order:
    address, axes = bound.addresses[plane][0], bound.axes[plane]
    slot = address.slot if paged else ((tokens, address.slot[0][1] if address.slot else address.page),)
    heads = ((bound.heads, address.head),) if "head" in axes.names else ()
    atoms = [
        (size, stride, atom)
        for digits, name in ((slot, "slot"), (heads, "head"), (address.elem, "dim"))
        for size, stride, atom in _atoms(name, digits)
    ]
    # A whole axis of one position has no stride of its own: it stands outside.
    strided = [(stride if size > 1 or atom.op else _OUTSIDE, atom) for size, stride, atom in atoms]
    return sorted(strided, key=lambda a: -a[0])


def _atoms(name: str, digits: Digits) -> list[tuple[int, int, Atom]]:
    """(size, stride, atom) of each digit of an axis."""
    if len(digits) < 2:
        return [(size, stride, Atom(name)) for size, stride in digits]
    (quotients, major), (factor, minor) = digits
    return [(quotients, major, Atom(name, "/", factor)), (factor, minor, Atom(name, "%", factor))]


def _interleaved(bound: BoundGroup, orders: Sequence[_Order], paged: bool) -> list[str] | None:
    """Axes of planes that lie side by side in a page, as in `(kv dim)`; None where they lie apart."""
    if len(orders) < 2 or any("kv" not in axes.names for axes in bound.axes):
        return None
    gap = bound.addresses[1][0].base - bound.addresses[0][0].base
    cut = sum(stride > gap for stride, _ in orders[0])
    outer = [atom for _, atom in orders[0][:cut]]
    apart = gap >= bound.addresses[0][0].page if paged else not outer
    if gap <= 0 or apart or any([atom for _, atom in order[:cut]] != outer for order in orders):
        return None
    inner = [" ".join(str(atom) for _, atom in order[cut:]) for order in orders]
    return [" ".join([*map(str, outer), f"(kv {text})" if text else "kv"]) for text in inner]
