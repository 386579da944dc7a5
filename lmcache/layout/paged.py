"""`PagedKV`: an engine's KV tensors, checked once against the spec and compiled to addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lmcache.errors import LayoutError, SpecError
from lmcache.layout.axes import Axes, Sizes, Strides, solve, strides_of
from lmcache.layout.bound import BoundGroup, BoundKV
from lmcache.layout.description import Layout
from lmcache.layout.window import host_window
from lmcache.spec import KVSpec, LayerGroup, Plane
from lmcache_kernels import PlaneAddress, on_host

LayerTensors = torch.Tensor | Sequence[torch.Tensor]
GroupTensors = LayerTensors | Mapping[str, LayerTensors]


class PagedKV:
    """An engine's KV tensors and their layout. The tensors are not copied; the engine keeps ownership.

    Args:
        tensors: per-layer tensors that hold all planes; or plane name → per-layer tensors; or, if the axes include
            `layer`, one tensor instead of a sequence. With several groups: group index → any of these.
        layout: one layout, or group index → layout.
    """

    def __init__(
        self,
        tensors: GroupTensors | Mapping[int, GroupTensors],
        layout: Layout | Mapping[int, Layout],
    ) -> None:
        self.tensors = tensors
        self.layout = layout
        self._bound: tuple[KVSpec, BoundKV] | None = None

    def bind(self, spec: KVSpec) -> BoundKV:
        """Checks the tensors against `spec` and compiles their addresses; cached for the same spec.

        Raises:
            SpecError: wrong number of layers, dtype or device, or tensors that are not plain strided memory.
            LayoutError: axes and shapes contradict each other.
        """
        if self._bound is None or self._bound[0] != spec:
            self._bound = (spec, _bind(spec, self._by_group(spec), self.layout))
        return self._bound[1]

    def _by_group(self, spec: KVSpec) -> list[GroupTensors]:
        count = len(spec.groups)
        if isinstance(self.tensors, Mapping) and any(type(key) is int for key in self.tensors):
            if set(self.tensors) != set(range(count)):
                raise SpecError(
                    f"tensors of groups {sorted(map(str, self.tensors))}, but the spec has groups 0..{count - 1}"
                )
            return [self.tensors[i] for i in range(count)]  # type: ignore[index]
        if count != 1:
            raise SpecError(f"the spec has {count} groups: pass tensors as a mapping from group index")
        return [self.tensors]  # type: ignore[list-item]


def _bind(spec: KVSpec, tensors: Sequence[GroupTensors], layout: Layout | Mapping[int, Layout]) -> BoundKV:
    groups = []
    for index, mine in enumerate(tensors):
        chosen = layout if isinstance(layout, Layout) else layout.get(index)
        if chosen is None:
            raise LayoutError(f"no layout for group {index} ({spec.groups[index].name!r})")
        groups.append(_bind_group(spec, index, mine, chosen))
    devices = {storage.device for group in groups for storage in group.storages}
    if len(devices) != 1:
        raise SpecError(f"KV tensors must be on one device, found {', '.join(sorted(map(str, devices)))}")
    return BoundKV(spec, tuple(groups), devices.pop())


def _bind_group(spec: KVSpec, index: int, tensors: GroupTensors, layout: Layout) -> BoundGroup:
    group = spec.groups[index]
    label = f"group {group.name!r}"
    layers, heads = len(spec.local_layers(index)), spec.local_heads(index)
    if not layers:
        raise SpecError(f"{label}: this rank holds none of its layers {group.layers}")
    if not isinstance(layout.axes, str):
        unknown = [name for name, _ in layout.axes if name not in {p.name for p in group.planes}]
        if unknown:
            raise LayoutError(f"{label}: the layout describes plane {unknown[0]!r}, the spec has no such plane")
    axes = {p.name: layout.axes_of(p.name) for p in group.planes}
    sources = _by_plane(label, group, axes, tensors)
    compiler = _Compiler(label, group, layout, axes, layers, heads)
    addresses, strides = [], []
    for plane in group.planes:
        per_layer = compiler.plane(plane, sources[plane.name])
        addresses.append(tuple(address for address, _ in per_layer))
        strides += [s for _, s in per_layer]
    shapes = {(s.pages, s.block_tokens) for s in strides}
    if len(shapes) != 1:
        text = ", ".join(f"{pages} pages of {tokens}" for pages, tokens in sorted(shapes))
        raise LayoutError(
            f"{label}: planes and layers differ in their pages: {text}; axis 'block' or 'slot' is misnamed"
        )
    pages, block_tokens = shapes.pop()
    storages, addresses = _in_one_window(compiler.storages, addresses)
    runs = any("batch" in a.names or ("block" not in a.names and "slot" not in a.factors) for a in axes.values())
    return BoundGroup(
        index,
        group.planes,
        tuple(addresses),
        storages,
        tuple(compiler.storages),
        heads,
        pages,
        block_tokens,
        tuple(axes.values()),
        runs,
    )


def _in_one_window(
    storages: Sequence[torch.Tensor], addresses: Sequence[tuple[PlaneAddress, ...]]
) -> tuple[tuple[torch.Tensor, ...], list[tuple[PlaneAddress, ...]]]:
    """Addresses separately allocated host memory through one window, so that one copy covers all layers."""
    if len({storage.device for storage in storages}) > 1 or len(storages) == 1 or not on_host(storages[0]):
        return tuple(storages), list(addresses)
    window, offsets = host_window(storages)
    moved = [tuple(replace(a, storage=0, base=a.base + offsets[a.storage]) for a in layers) for layers in addresses]
    return (window,), moved


def _by_plane(
    label: str, group: LayerGroup, axes: Mapping[str, Axes], tensors: GroupTensors
) -> dict[str, LayerTensors]:
    names = [p.name for p in group.planes]
    if isinstance(tensors, Mapping):
        if set(tensors) != set(names):
            raise SpecError(f"{label}: tensors of planes {sorted(map(str, tensors))}, the spec has {names}")
        return {name: tensors[name] for name in names}
    lone = [name for name in names if "kv" not in axes[name].names]
    if lone and len(names) > 1:
        raise LayoutError(
            f"{label}: planes {', '.join(names)} share one tensor, but the axes of {lone[0]!r} have no 'kv' to tell them "
            "apart; add it, or pass a mapping from plane name to tensors"
        )
    return dict.fromkeys(names, tensors)


class _Compiler:
    """Compiles tensors to addresses. Layers of the same shape and strides are solved once."""

    def __init__(
        self, label: str, group: LayerGroup, layout: Layout, axes: Mapping[str, Axes], layers: int, heads: int
    ) -> None:
        self.label, self.group, self.layout, self.axes = label, group, layout, axes
        self.layers, self.heads = layers, heads
        self.storages: list[torch.Tensor] = []
        self._by_pointer: dict[tuple[str, int], int] = {}
        self._solved: dict[object, Strides] = {}

    def plane(self, plane: Plane, source: LayerTensors) -> list[tuple[PlaneAddress, Strides]]:
        """Returns (address, strides) of each local layer of one plane."""
        where, itemsize = f"{self.label}, plane {plane.name!r}", plane.itemsize
        if isinstance(source, torch.Tensor):
            if "layer" not in self.axes[plane.name].names:
                raise LayoutError(
                    f"{where}: one tensor for all {self.layers} layers needs an axis 'layer'; pass a list of tensors"
                )
            strides = self._strides(plane, source, where, itemsize)
            assert strides.layer is not None
            step = strides.layer
            return [(self._address(source, strides, i * step, itemsize), strides) for i in range(self.layers)]
        if not isinstance(source, Sequence):
            raise SpecError(f"{where}: expected a tensor or a sequence of tensors, not {type(source).__name__}")
        if "layer" in self.axes[plane.name].names:
            raise LayoutError(f"{where}: axes with 'layer' describe one tensor, but a sequence was passed")
        if len(source) != self.layers:
            raise SpecError(f"{where}: {len(source)} tensors for {self.layers} local layers")
        out = []
        for i, tensor in enumerate(source):
            strides = self._strides(plane, tensor, f"{where}, layer {i}", itemsize)
            out.append((self._address(tensor, strides, 0, itemsize), strides))
        return out

    def _address(self, tensor: torch.Tensor, s: Strides, offset: int, itemsize: int) -> PlaneAddress:
        base = int(tensor.storage_offset()) * tensor.element_size() + s.offset + offset
        return PlaneAddress(self._storage(tensor), base, s.page, s.head, s.slot, s.elem, itemsize)

    def _storage(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr())
        if key not in self._by_pointer:
            self._by_pointer[key] = len(self.storages)
            self.storages.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        return self._by_pointer[key]

    def _strides(self, plane: Plane, tensor: torch.Tensor, where: str, itemsize: int) -> Strides:
        if not isinstance(tensor, torch.Tensor):
            raise SpecError(f"{where}: expected a tensor, not {type(tensor).__name__}")
        key = (plane.name, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            raise SpecError(f"{where}: needs plain strided memory, not a {tensor.layout} tensor on {tensor.device}")
        if key not in self._solved:
            _check_dtype(plane, tensor, where)
            shared = self.axes
            if "kv" in self.axes[plane.name].names:
                shared = {n: a for n, a in self.axes.items() if "kv" in a.names}
            else:
                shared = {plane.name: self.axes[plane.name]}
            elems = {p.name: p.elems for p in self.group.planes}
            sizes = {n: Sizes(self.heads, self.layers, elems[n], self.layout.block_tokens) for n in shared}
            found = solve(where, shared, sizes, tensor.shape)
            dim_strides = [s * itemsize for s in tensor.stride()]
            _check_injective(tensor, where, self.axes[plane.name])
            self._solved[key] = strides_of(plane.name, shared, found, dim_strides, sizes[plane.name])
        return self._solved[key]


def _check_dtype(plane: Plane, tensor: torch.Tensor, where: str) -> None:
    """Accepts the spec's dtype, or raw bits: an unsigned integer of the same width (engines store fp8 in uint8 tensors)."""
    raw = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    if tensor.dtype == plane.torch_dtype or (tensor.dtype in raw and tensor.element_size() == plane.itemsize):
        return
    raise SpecError(f"{where}: the tensor is {tensor.dtype}, the spec requires {plane.torch_dtype}")


def _check_injective(tensor: torch.Tensor, where: str, axes: Axes) -> None:
    """Raises if different indices share bytes, since a scatter would overwrite its own writes."""
    reach = 1
    for stride, size, i in sorted(
        (stride, size, i) for i, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    ):
        if size > 1:
            if stride < reach:
                name = " ".join(map(str, axes.dims[i]))
                raise LayoutError(
                    f"{where}: dimension {i} ({name}) overlaps others: sizes {tuple(tensor.shape)}, strides {tensor.stride()}"
                )
            reach += (size - 1) * stride
