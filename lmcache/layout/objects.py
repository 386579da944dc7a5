"""`ObjectLayout`: how the bytes of one object are arranged. Plain data, goes into file headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

from lmcache.errors import LayoutError
from lmcache.layout.axes import Atom, Axes, Sizes, dim_extent, known_extents, solve, strides_of
from lmcache.spec import KVSpec, Plane
from lmcache_kernels import Digits, PlaneAddress

CANONICAL_AXES = "layer slot head dim"
_MAX = 1 << 40
_MAX_LAYERS = 1 << 16


class Segment(NamedTuple):
    """A contiguous run of an object: `planes` of local layer `layer`, at bytes [offset, offset + nbytes)."""

    planes: tuple[str, ...]
    layer: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ObjectPlane:
    """One plane of an object. Planes whose axes contain `kv` share one dense region; every other has its own.

    Attributes:
        name, dtype, elems: as in the spec.
        axes: axis string; the first axis is `layer`.
        block_tokens: tokens of a page where the axes have a `block`, else the object's tokens.
    """

    name: str
    dtype: str
    elems: int
    axes: str
    block_tokens: int


@dataclass(frozen=True)
class PlaneBytes:
    """Where a plane lies in the object: `addresses[layer]`, pages of `address.slot` tokens, `tokens` over all of them."""

    addresses: tuple[PlaneAddress, ...]
    layer: int
    pages: int
    tokens: Digits
    itemsize: int


@dataclass(frozen=True, eq=False)
class ObjectLayout:
    """The dense arrangement of one object of `tokens` tokens × `layers` layers × `heads` kv heads.

    Frozen, hashable and comparable: two equal layouts mean the same bytes at the same places.
    """

    planes: tuple[ObjectPlane, ...]
    layers: int
    heads: int
    tokens: int
    order: Literal["canonical", "native"] = "native"

    @staticmethod
    def canonical(spec: KVSpec, group: int, tokens: int) -> ObjectLayout:
        """Plane, layer, token, head, element: what every engine, block size and processor can read."""
        planes = tuple(ObjectPlane(p.name, p.dtype, p.elems, CANONICAL_AXES, tokens) for p in spec.groups[group].planes)
        layers, heads = len(spec.local_layers(group)), spec.local_heads(group)
        return ObjectLayout(planes, layers, heads, tokens, "canonical").checked()

    # ------------------------------------------------------------ plain data

    def describe(self) -> dict[str, Any]:
        """JSON-able; `from_description` gives the same layout back. `shape` is (layers, tokens, heads, elems)."""
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
        """The layout that `describe` described. Trusts nothing: `LayoutError` if `data` is not such a description."""
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
        """Self, or `LayoutError` if it is not a dense arrangement with `layer` outermost."""
        if not self.planes or len({p.name for p in self.planes}) != len(self.planes):
            raise LayoutError(f"an object needs planes with distinct names, got {[p.name for p in self.planes]}")
        if min(self.layers, self.heads, self.tokens, *(p.elems for p in self.planes)) < 1 or self.layers > _MAX_LAYERS:
            raise LayoutError(f"an object of {self.layers} layers × {self.tokens} tokens × {self.heads} heads is none")
        for plane in self.planes:
            first = Axes.parse(plane.axes).dims[0]
            if first[0] != Atom("layer"):
                raise LayoutError(f"object axes {plane.axes!r} of plane {plane.name!r} must begin with 'layer'")
            if plane.block_tokens < 1 or self.tokens % plane.block_tokens:
                raise LayoutError(f"plane {plane.name!r}: {self.tokens} tokens are no pages of {plane.block_tokens}")
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
        """Planes by the dense region they lie in, in the order of the regions."""
        shared = tuple(p.name for p in self.planes if "kv" in Axes.parse(p.axes).names)
        regions: list[tuple[str, ...]] = []
        for plane in self.planes:
            mine = shared if plane.name in shared else (plane.name,)
            if mine not in regions:
                regions.append(mine)
        return tuple(regions)

    @cached_property
    def places(self) -> dict[str, PlaneBytes]:
        """Address tables per plane."""
        by_name = {p.name: p for p in self.planes}
        out: dict[str, PlaneBytes] = {}
        start = 0
        for region in self.regions:
            planes = {name: by_name[name] for name in region}
            found, nbytes = _dense(self, planes, start)
            out.update(found)
            start += nbytes
        if start != self.nbytes:
            raise LayoutError(f"an object of {self.nbytes} bytes, but its axes cover {start}")
        return {p.name: out[p.name] for p in self.planes}

    def segments(self) -> tuple[Segment, ...]:
        """The contiguous runs of (planes, layer), ascending; together they are the whole object."""
        out, start = [], 0
        for region in self.regions:
            size = self.places[region[0]].layer
            for layer in range(self.layers):
                out.append(Segment(region, layer, start, size))
                start += size
        return tuple(out)

    @cached_property
    def translations(self) -> dict[ObjectLayout, Any]:
        """Compiled copies to other layouts, kept by `lmcache.layout.translate`."""
        return {}

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Equal signatures = the same bytes at the same places, however the axes are written."""
        out = []
        for name, place in self.places.items():
            address = place.addresses[0]
            axes = (place.tokens, ((self.heads, address.head),), address.elem)
            out.append(
                (name, address.base, place.layer if self.layers > 1 else 0, tuple(_plain(digits) for digits in axes))
            )
        return tuple(out)


def _plain(digits: Digits) -> Digits:
    """Without digits of size 1, and with digits joined that continue each other."""
    out: list[tuple[int, int]] = []
    for size, stride in digits:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out)


def _dense(layout: ObjectLayout, planes: Mapping[str, ObjectPlane], start: int) -> tuple[dict[str, PlaneBytes], int]:
    """Addresses of planes that share one dense region beginning at byte `start`, and the region's bytes."""
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
    """`LayoutError` unless both describe an object of the same spec and extent."""
    left = [(p.name, p.dtype, p.elems) for p in a.planes]
    right = [(p.name, p.dtype, p.elems) for p in b.planes]
    if (left, a.layers, a.heads, a.tokens) != (right, b.layers, b.heads, b.tokens):
        raise LayoutError(
            f"objects differ: {left} × {a.layers} layers × {a.heads} heads × {a.tokens} tokens, "
            f"and {right} × {b.layers} × {b.heads} × {b.tokens}"
        )
