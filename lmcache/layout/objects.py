"""`ObjectLayout`: the arrangement of the bytes of one object. Plain data, stored in file headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lmcache.errors import LayoutError
from lmcache.layout.axes import Atom, Axes, Sizes, dim_extent, known_extents, solve, strides_of
from lmcache.spec import KVSpec, Plane
from lmcache_kernels import Digits, PlaneAddress, join_digits

if TYPE_CHECKING:
    import torch

CANONICAL_AXES = "layer slot head dim"
_MAX = 1 << 40
_MAX_LAYERS = 1 << 16


class SegmentSpan(NamedTuple):
    """A contiguous run of an object: `planes` of local layer `layer`, bytes [offset, offset + nbytes)."""

    planes: tuple[str, ...]
    layer: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ObjectPlane:
    """One plane of an object. Planes whose axes contain `kv` share one dense region; every other plane has its own.

    Attributes:
        name, dtype, elems: as in the spec.
        axes: axis string; the first axis is `layer`.
        block_tokens: tokens per page if the axes have a `block`, else the object's tokens.
    """

    name: str
    dtype: str
    elems: int
    axes: str
    block_tokens: int


@dataclass(frozen=True)
class PlaneBytes:
    """Addresses of a plane in the object.

    Attributes:
        addresses: per layer; `slot` has the tokens of one page.
        layer: bytes from one layer to the next.
        pages: number of pages.
        tokens: digits over the tokens of all pages.
        itemsize: bytes per element.
    """

    addresses: tuple[PlaneAddress, ...]
    layer: int
    pages: int
    tokens: Digits
    itemsize: int


@dataclass(frozen=True, eq=False)
class ObjectLayout:
    """The dense arrangement of one object of `tokens` tokens × `layers` layers × `heads` kv heads.

    Immutable, hashable and comparable: equal layouts place the same elements at the same bytes.
    """

    planes: tuple[ObjectPlane, ...]
    layers: int
    heads: int
    tokens: int
    order: Literal["canonical", "native"] = "native"

    @staticmethod
    def canonical(spec: KVSpec, group: int, tokens: int) -> ObjectLayout:
        """Returns the canonical layout: plane, layer, token, head, element; independent of engine, block size and CPU."""
        planes = tuple(ObjectPlane(p.name, p.dtype, p.elems, CANONICAL_AXES, tokens) for p in spec.groups[group].planes)
        layers, heads = len(spec.local_layers(group)), spec.local_heads(group)
        return ObjectLayout(planes, layers, heads, tokens, "canonical").checked()

    # ------------------------------------------------------------ plain data

    def describe(self) -> dict[str, Any]:
        """Returns a JSON-serialisable description; `from_description` is the inverse.

        `shape` is (layers, tokens, heads, elems).
        """
        planes = [
            {
                "name": p.name,
                "dtype": p.dtype,
                "shape": [self.layers, self.tokens, self.heads, p.elems],
                "axes": p.axes,
                "block_tokens": p.block_tokens,
            }
            for p in self.planes
        ]
        return {"order": self.order, "planes": planes}

    @staticmethod
    def from_description(data: Mapping[str, Any]) -> ObjectLayout:
        """Creates a layout from the output of `describe`. `data` is untrusted: raises `LayoutError` if it is not valid."""
        try:
            shapes = {tuple(plane["shape"][:3]) for plane in data["planes"]}
            planes = tuple(
                ObjectPlane(
                    _text(p["name"]),
                    _text(p["dtype"]),
                    _natural(p["shape"][3]),
                    _text(p["axes"]),
                    _natural(p["block_tokens"]),
                )
                for p in data["planes"]
                if len(p["shape"]) == 4
            )
            if len(shapes) != 1 or len(planes) != len(data["planes"]):
                raise LayoutError("planes of one object need the same (layers, tokens, heads, …)")
            layers, tokens, heads = (_natural(n) for n in shapes.pop())
            order = data["order"]
            if order not in ("canonical", "native"):
                raise LayoutError(f"order must be 'canonical' or 'native', not {order!r}")
            return ObjectLayout(planes, layers, heads, tokens, order).checked()
        except LayoutError:
            raise
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise LayoutError(f"not an object layout: {type(error).__name__}: {error}") from error

    def checked(self) -> ObjectLayout:
        """Returns self; raises `LayoutError` if this is not a dense arrangement with `layer` outermost."""
        if not self.planes or len({p.name for p in self.planes}) != len(self.planes):
            raise LayoutError(f"an object needs planes with distinct names, got {[p.name for p in self.planes]}")
        if min(self.layers, self.heads, self.tokens, *(p.elems for p in self.planes)) < 1 or self.layers > _MAX_LAYERS:
            raise LayoutError(
                f"invalid extents {self.layers} layers × {self.tokens} tokens × {self.heads} heads × "
                f"{[p.elems for p in self.planes]} elements: each must be 1 or more, layers at most {_MAX_LAYERS}"
            )
        for plane in self.planes:
            first = Axes.parse(plane.axes).dims[0]
            if first[0] != Atom("layer"):
                raise LayoutError(f"object axes {plane.axes!r} of plane {plane.name!r} must begin with 'layer'")
            if plane.block_tokens < 1 or self.tokens % plane.block_tokens:
                raise LayoutError(
                    f"plane {plane.name!r}: {self.tokens} tokens are not a multiple of block_tokens={plane.block_tokens}"
                )
            if self.order == "canonical" and plane.axes != CANONICAL_AXES:
                raise LayoutError(f"canonical order is {CANONICAL_AXES!r}, not {plane.axes!r}")
        _ = self.places
        return self

    @cached_property
    def _key(self) -> tuple[object, ...]:
        return (self.planes, self.layers, self.heads, self.tokens, self.order)

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ObjectLayout) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    # ------------------------------------------------------------ bytes

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the object."""
        per_head = sum(p.elems * self._itemsize(p) for p in self.planes)
        return per_head * self.heads * self.layers * self.tokens

    def _itemsize(self, plane: ObjectPlane) -> int:
        return Plane(plane.name, plane.dtype, plane.elems).itemsize

    @cached_property
    def regions(self) -> tuple[tuple[str, ...], ...]:
        """The planes in each dense region, in the order of the regions."""
        shared = tuple(p.name for p in self.planes if "kv" in Axes.parse(p.axes).names)
        regions: list[tuple[str, ...]] = []
        for plane in self.planes:
            mine = shared if plane.name in shared else (plane.name,)
            if mine not in regions:
                regions.append(mine)
        return tuple(regions)

    @cached_property
    def places(self) -> dict[str, PlaneBytes]:
        """Addresses of each plane."""
        by_name = {p.name: p for p in self.planes}
        out: dict[str, PlaneBytes] = {}
        start = 0
        for region in self.regions:
            planes = {name: by_name[name] for name in region}
            found, nbytes = _dense(self, planes, start)
            out.update(found)
            start += nbytes
        if start != self.nbytes:
            raise LayoutError(f"the object has {self.nbytes} bytes, but its axes cover {start}")
        return {p.name: out[p.name] for p in self.planes}

    def segments(self) -> tuple[SegmentSpan, ...]:
        """Returns the contiguous runs of (planes, layer), ascending; together they cover the whole object."""
        out, start = [], 0
        for region in self.regions:
            size = self.places[region[0]].layer
            for layer in range(self.layers):
                out.append(SegmentSpan(region, layer, start, size))
                start += size
        return tuple(out)

    @cached_property
    def translations(self) -> dict[ObjectLayout, Any]:
        """Cache of compiled copies to other layouts, filled by `lmcache.layout.translate`."""
        return {}

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Equal signatures mean that the same elements are at the same bytes, however the axes are written."""
        out = []
        for name, place in self.places.items():
            address = place.addresses[0]
            axes = (place.tokens, ((self.heads, address.head),), address.elem)
            out.append((name, address.base, place.layer if self.layers > 1 else 0, tuple(map(join_digits, axes))))
        return tuple(out)


def _dense(layout: ObjectLayout, planes: Mapping[str, ObjectPlane], start: int) -> tuple[dict[str, PlaneBytes], int]:
    """Returns the addresses of planes that share one dense region starting at byte `start`, and the region's size in bytes."""
    label = "object"
    itemsizes = {layout._itemsize(p) for p in planes.values()}
    if len({p.dtype for p in planes.values()}) > 1:
        raise LayoutError(f"planes {', '.join(planes)} share a region, so they need one dtype")
    itemsize = itemsizes.pop()
    axes = {name: Axes.parse(p.axes) for name, p in planes.items()}
    sizes = {
        name: Sizes(layout.heads, layout.layers, p.elems, p.block_tokens, layout.tokens) for name, p in planes.items()
    }
    rank = len(next(iter(axes.values())).dims)
    if any(len(a.dims) != rank for a in axes.values()):
        raise LayoutError(f"planes {', '.join(planes)} share a region, so their axes need as many dimensions")
    found = {name: known_extents(label, name, a, sizes[name], len(axes)) for name, a in axes.items()}
    shape = [dim_extent(label, {n: a.dims[i] for n, a in axes.items()}, found) for i in range(rank)]
    found = solve(label, axes, sizes, shape)
    for name, plane in planes.items():
        held = prod(extent for atom, extent in found[name].items() if atom.name != "kv")
        if held != layout.layers * layout.heads * layout.tokens * plane.elems:
            raise LayoutError(
                f"axes {plane.axes!r} of plane {name!r} have {held} places for its elements, not as many as those"
            )
    dim_strides = [itemsize * prod(shape[i + 1 :]) for i in range(rank)]
    out = {}
    for name in planes:
        s = strides_of(name, axes, found, dim_strides, sizes[name])
        layer = s.layer or 0
        addresses = tuple(
            PlaneAddress(0, start + s.offset + i * layer, s.page, s.head, s.slot, s.elem, itemsize)
            for i in range(layout.layers)
        )
        out[name] = PlaneBytes(addresses, layer, s.pages, ((s.pages, s.page), *s.slot), itemsize)
    return out, itemsize * prod(shape)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX:
        raise LayoutError(f"expected a count, got {value!r}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 256:
        raise LayoutError(f"expected a short string, got {value!r}")
    return value


def same_planes(a: ObjectLayout, b: ObjectLayout) -> None:
    """Raises `LayoutError` unless both layouts describe objects of the same planes and extents."""
    left = [(p.name, p.dtype, p.elems) for p in a.planes]
    right = [(p.name, p.dtype, p.elems) for p in b.planes]
    if (left, a.layers, a.heads, a.tokens) != (right, b.layers, b.heads, b.tokens):
        raise LayoutError(
            f"objects differ: {left} × {a.layers} layers × {a.heads} heads × {a.tokens} tokens, "
            f"and {right} × {b.layers} × {b.heads} × {b.tokens}"
        )


def canonical_views(buffer: torch.Tensor, layout: ObjectLayout) -> dict[str, torch.Tensor]:
    """Returns plane → `(layers, tokens, heads, elems × itemsize)` byte views of a canonical object (uint8 `(nbytes,)`)."""
    out, start = {}, 0
    for plane in layout.planes:
        row = plane.elems * layout.places[plane.name].itemsize
        size = layout.layers * layout.tokens * layout.heads * row
        out[plane.name] = buffer[start : start + size].view(layout.layers, layout.tokens, layout.heads, row)
        start += size
    return out
