"""Engines' memory layouts as naive index arithmetic: the oracle for layouts. Uses raw tensors, not `lmcache.layout`.

A `Lab` builds the tensors of one engine and maps each element to a tensor and an index. Comparisons are of bits, so that
NaN payloads and signed zeros count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmcache.spec import KVSpec, LayerGroup, Plane
from lmcache_conformance.suites.layouts import LayoutTests, all_tensors, storages

Index = tuple["torch.Tensor | int", ...]
Locate = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Index]]
"""(plane, layer, slot, head, element) → tensor and index of these elements."""


@dataclass
class Lab:
    """One engine's memory; `locate` implements its index arithmetic."""

    name: str
    axes: str | Mapping[str, str]
    block_tokens: int | None
    spec: KVSpec
    tensors: Any
    locate: Locate
    num_slots: int

    def all_tensors(self) -> list[torch.Tensor]:
        return all_tensors(self.tensors)

    def storages(self) -> list[torch.Tensor]:
        """Returns the engine's memory as bytes, each storage once."""
        return storages(self.tensors)

    def randomize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for storage in self.storages():
            storage.copy_(torch.randint(0, 256, storage.shape, generator=generator, dtype=torch.uint8))

    def read_token(self, plane: str, layer: int, slot: int) -> torch.Tensor:
        """Reads `(heads, elems)` of one token."""
        tensor, index = self._place(self._plane(plane), layer, torch.tensor([slot]))
        return tensor[index][0]

    def write_token(self, plane: str, layer: int, slot: int, values: torch.Tensor) -> None:
        """Writes `(heads, elems)` of one token."""
        self.write(self._plane(plane), layer, torch.tensor([slot]), values[None])

    def _plane(self, name: str) -> Plane:
        return next(plane for plane in self.spec.groups[0].planes if plane.name == name)

    def read(self, plane: Plane, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Reads `(slots, heads, elems)` as integers of the plane's element size."""
        tensor, index = self._place(plane, layer, slots)
        return bits(tensor)[index]

    def write(self, plane: Plane, layer: int, slots: torch.Tensor, values: torch.Tensor) -> None:
        tensor, index = self._place(plane, layer, slots)
        bits(tensor)[index] = bits(values)

    def _place(self, plane: Plane, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, Index]:
        heads = self.spec.groups[0].kv_heads
        s = slots.view(-1, 1, 1)
        h = torch.arange(heads).view(1, -1, 1)
        e = torch.arange(plane.elems).view(1, 1, -1)
        s, h, e = torch.broadcast_tensors(s, h, e)  # type: ignore[no-untyped-call]
        return self.locate(plane.name, layer, s, h, e)

    def canonical(self, slots: torch.Tensor) -> torch.Tensor:
        """Returns the canonical bytes of an object of these slots, element by element."""
        group = self.spec.groups[0]
        parts = [
            self.read(plane, layer, slots).contiguous().view(torch.uint8).reshape(-1)
            for plane in group.planes
            for layer in range(len(group.layers))
        ]
        return torch.cat(parts)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor viewed as integers of the same element size."""
    by_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(by_width[tensor.element_size()])


def spec_of(
    planes: Sequence[tuple[str, torch.dtype, int]], *, layers: int = 3, heads: int = 2, name: str = "lab"
) -> KVSpec:
    """Returns a spec of one group with these planes: (name, dtype, elements)."""
    made = tuple(Plane(n, str(dtype).removeprefix("torch."), elems) for n, dtype, elems in planes)
    return KVSpec.of_groups(name, (LayerGroup("full", tuple(range(layers)), made, heads),))


def kv_spec(dtype: torch.dtype, *, layers: int = 3, heads: int = 2, dim: int = 8, v_dim: int | None = None) -> KVSpec:
    """Returns a spec of one group with planes `k` and `v`."""
    return spec_of([("k", dtype, dim), ("v", dtype, v_dim or dim)], layers=layers, heads=heads)


_PHYSICAL = {  # vLLM's KVCacheLayout: physical order of layer, block, head, slot, C
    "LBHNC": "lbhnc",
    "LBNHC": "lbnhc",
    "LHBNC": "lhbnc",
    "BLHNC": "blhnc",
    "BLNHC": "blnhc",
    "BHLNC": "bhlnc",
}


def vllm_packed(order: str, dtype: torch.dtype = torch.bfloat16, heads: int = 2, blocks: int = 7, bt: int = 4) -> Lab:
    """vLLM packed: per layer a strided view `[block, head, slot, C]` of one storage, C = K‖V."""
    layers, dim = 3, 8
    size = {"l": layers, "b": blocks, "h": heads, "n": bt, "c": 2 * dim}
    physical = _PHYSICAL[order]
    storage = torch.zeros([size[axis] for axis in physical], dtype=dtype)
    logical = storage.permute([physical.index(axis) for axis in "lbhnc"])
    views = [logical[i] for i in range(layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        return views[layer], (s // bt, h, s % bt, e + dim * (plane == "v"))

    return Lab(
        f"vllm packed {order}", "block head slot (kv dim)", bt, kv_spec(dtype, heads=heads), views, locate, blocks * bt
    )


def vllm_cpu_vec(heads: int = 2) -> Lab:
    """vLLM on CPU, fp32: inside (block, head), K transposed, followed by V as it is."""
    layers, dim, bt, blocks = 3, 8, 4, 6
    views = [torch.zeros(blocks, heads, 2 * bt * dim) for _ in range(layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        n = s % bt
        inner = e * bt + n if plane == "k" else bt * dim + n * dim + e
        return views[layer], (s // bt, h, inner)

    axes = {"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"}
    return Lab("vllm cpu vec", axes, bt, kv_spec(torch.float32, heads=heads), views, locate, blocks * bt)


def vllm_cpu_amx(heads: int = 2) -> Lab:
    """vLLM on a CPU with AMX, bf16: K and V in tiles."""
    layers, dim, bt, blocks = 2, 32, 32, 4
    views = [torch.zeros(blocks, heads, 2 * bt * dim, dtype=torch.bfloat16) for _ in range(layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        n = s % bt
        if plane == "k":  # slot/16 dim/2 slot%16 dim%2
            inner = ((n // 16 * (dim // 2) + e // 2) * 16 + n % 16) * 2 + e % 2
        else:  # dim/16 slot/2 dim%16 slot%2
            inner = bt * dim + ((e // 16 * (bt // 2) + n // 2) * 16 + e % 16) * 2 + n % 2
        return views[layer], (s // bt, h, inner)

    axes = {"k": "block head (kv slot/16 dim/2 slot%16 dim%2)", "v": "block head (kv dim/16 slot/2 dim%16 slot%2)"}
    spec = kv_spec(torch.bfloat16, layers=layers, heads=heads, dim=dim)
    return Lab("vllm cpu amx", axes, bt, spec, views, locate, blocks * bt)


def plain(axes: str, dtype: torch.dtype = torch.bfloat16, *, heads: int = 2, bt: int = 4, blocks: int = 7) -> Lab:
    """Any layout of unsplit axes: one tensor per layer, or one for all layers if the axes include `layer`."""
    layers, dim = 3, 8
    names = axes.split()
    pool = "block" not in names
    slots = blocks * bt
    size = {
        "kv": 2,
        "block": blocks,
        "slot": slots if pool else bt,
        "head": heads,
        "dim": dim,
        "layer": layers,
        "one": 1,
    }
    shape = [size[name] for name in names]
    one = "layer" in names
    views = [torch.zeros(shape, dtype=dtype) for _ in range(1 if one else layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        place: dict[str, torch.Tensor | int] = {
            "kv": int(plane == "v"),
            "block": s // bt,
            "slot": s if pool else s % bt,
            "head": h,
            "dim": e,
            "layer": layer,
            "one": 0,
        }
        return views[0 if one else layer], tuple(place[name] for name in names)

    spec = kv_spec(dtype, heads=heads)
    return Lab(axes, axes, None if pool else bt, spec, views[0] if one else views, locate, slots)


def per_plane(
    axes: str, dtype: torch.dtype = torch.bfloat16, *, heads: int = 2, batch: int = 2, length: int = 30
) -> Lab:
    """K and V in separate tensors: SGLang's `slot head dim` pools, HF's `batch head slot dim` caches."""
    layers, dim = 3, 8
    names = axes.split()
    size = {"batch": batch, "slot": length if "batch" in names else batch * length, "head": heads, "dim": dim}
    tensors = {p: [torch.zeros([size[n] for n in names], dtype=dtype) for _ in range(layers)] for p in "kv"}

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        place = {"batch": s // length, "slot": s % length if "batch" in names else s, "head": h, "dim": e}
        return tensors[plane][layer], tuple(place[name] for name in names)

    return Lab(f"per plane {axes}", axes, None, kv_spec(dtype, heads=heads), tensors, locate, batch * length)


def mla(axes: str, *, bt: int = 4, blocks: int = 7) -> Lab:
    """Multi-head latent attention: one latent vector per token, one head."""
    layers, latent = 3, 24
    names = axes.split()
    pool = "block" not in names
    size = {"block": blocks, "slot": blocks * bt if pool else bt, "latent": latent, "one": 1, "layer": layers}
    one = "layer" in names
    tensors = [torch.zeros([size[n] for n in names], dtype=torch.bfloat16) for _ in range(1 if one else layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        place: dict[str, torch.Tensor | int] = {"block": s // bt, "slot": s if pool else s % bt, "latent": e}
        place |= {"one": 0, "layer": layer}
        return tensors[0 if one else layer], tuple(place[name] for name in names)

    spec = spec_of([("latent", torch.bfloat16, latent)], layers=layers, heads=1)
    return Lab(f"mla {axes}", axes, None if pool else bt, spec, tensors[0] if one else tensors, locate, blocks * bt)


def ambiguous(which: str) -> Lab:
    """`[block, slot, 2, 2·dim]` with two kv heads: either K‖V per head, or all heads per K and V. Same shape, other bytes."""
    layers, dim, bt, blocks, heads = 3, 8, 4, 6, 2
    views = [torch.zeros(blocks, bt, 2, 2 * dim, dtype=torch.float16) for _ in range(layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        v = int(plane == "v")
        if which == "head (kv dim)":
            return views[layer], (s // bt, s % bt, h, e + dim * v)
        return views[layer], (s // bt, s % bt, v, e + dim * h)

    axes = f"block slot {which}"
    return Lab(f"ambiguous {which}", axes, bt, kv_spec(torch.float16, heads=heads), views, locate, blocks * bt)


def unequal() -> Lab:
    """K and V in one tensor with fewer elements in V: `(kv dim)` with parts of different sizes."""
    layers, dk, dv, bt, blocks, heads = 3, 12, 8, 4, 6, 2
    views = [torch.zeros(blocks, bt, heads, dk + dv, dtype=torch.bfloat16) for _ in range(layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        return views[layer], (s // bt, s % bt, h, e + dk * (plane == "v"))

    spec = kv_spec(torch.bfloat16, heads=heads, dim=dk, v_dim=dv)
    return Lab("unequal (kv dim)", "block slot head (kv dim)", bt, spec, views, locate, blocks * bt)


def with_scales() -> Lab:
    """fp8 K and V, and an fp32 scale per token and head: planes of different dtype and size."""
    layers, dim, slots, heads = 3, 8, 28, 2
    dtypes = {"k": torch.float8_e4m3fn, "v": torch.float8_e5m2, "scale": torch.float32}
    elems = {"k": dim, "v": dim, "scale": 1}
    tensors = {
        p: [torch.zeros([slots, heads, elems[p]][: 2 if p == "scale" else 3], dtype=d) for _ in range(layers)]
        for p, d in dtypes.items()
    }

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        return tensors[plane][layer], ((s, h) if plane == "scale" else (s, h, e))

    spec = spec_of([(p, d, elems[p]) for p, d in dtypes.items()], layers=layers, heads=heads)
    axes = {"k": "slot head dim", "v": "slot head dim", "scale": "slot head"}
    return Lab("fp8 with scales", axes, None, spec, tensors, locate, slots)


def state() -> Lab:
    """A recurrent state: one vector per block, no slot axis."""
    layers, dim, blocks = 3, 8, 28
    tensors = [torch.zeros(blocks, dim, dtype=torch.float32) for _ in range(layers)]

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        return tensors[layer], (s, e)

    spec = spec_of([("state", torch.float32, dim)], layers=layers, heads=1)
    return Lab("state", "block dim", 1, spec, tensors, locate, blocks)


def factored_pool() -> Lab:
    """A pool without a block axis whose slot axis is split; the quotient is the page."""
    layers, dim, heads, groups = 3, 8, 2, 7
    tensors = {p: [torch.zeros(groups, heads, 4, dim, dtype=torch.int8) for _ in range(layers)] for p in "kv"}

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        return tensors[plane][layer], (s // 4, h, s % 4, e)

    return Lab("factored pool", "slot/4 head slot%4 dim", None, kv_spec(torch.int8), tensors, locate, 4 * groups)


LABS: dict[str, Callable[[], Lab]] = {
    **{f"vllm packed {order}": lambda order=order: vllm_packed(order) for order in _PHYSICAL},  # type: ignore[misc]
    "vllm packed, one head": lambda: vllm_packed("LBNHC", heads=1),
    "vllm packed, fp8": lambda: vllm_packed("LBHNC", torch.float8_e4m3fn),
    "vllm cpu vec": vllm_cpu_vec,
    "vllm cpu vec, one head": lambda: vllm_cpu_vec(heads=1),
    "vllm cpu amx": vllm_cpu_amx,
    "flash attention": lambda: plain("kv block slot head dim"),
    "flashinfer nhd": lambda: plain("block kv slot head dim"),
    "flashinfer hnd": lambda: plain("block kv head slot dim"),
    "vllm mla": lambda: mla("block slot latent"),
    "sglang mla": lambda: mla("slot one latent"),
    "sglang mla host": lambda: mla("layer slot one latent"),
    "sglang mha": lambda: per_plane("slot head dim"),
    "sglang host layer_first": lambda: plain("kv layer slot head dim"),
    "sglang host page_first": lambda: plain("kv slot layer head dim"),
    "sglang host page_first_direct": lambda: plain("kv block layer slot head dim"),
    "sglang host page_head": lambda: plain("kv block head slot layer dim"),
    "hf": lambda: per_plane("batch head slot dim"),
    "hf, one sequence": lambda: per_plane("batch head slot dim", torch.float32, batch=1, length=60),
    "head first pool": lambda: per_plane("head slot dim"),
    "ambiguous head (kv dim)": lambda: ambiguous("head (kv dim)"),
    "ambiguous kv (head dim)": lambda: ambiguous("kv (head dim)"),
    "unequal": unequal,
    "fp8 with scales": with_scales,
    "state": state,
    "factored pool": factored_pool,
}


class LabLayoutTests(LayoutTests):
    """The layout suite for every engine layout above."""

    variants = tuple(LABS)

    def make(self, variant: str) -> Lab:
        """See `LayoutTests`."""
        return LABS[variant]()
