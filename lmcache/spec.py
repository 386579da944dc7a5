"""Describes a model's KV cache: planes, layer groups, the rectangle held by one rank, and the numerics of the values.

Where an engine keeps these values in memory is described by `lmcache.layout`. All records are frozen plain data (msgspec
structs), so that they can be hashed, compared, sent between processes and written into file headers.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Literal

import msgspec
import torch

from lmcache.errors import SpecError
from lmcache.numerics import environment_switches


class Plane(msgspec.Struct, frozen=True):
    """One kind of value per (token, layer, kv head): `k`, `v`, `latent`, `scale`, …

    Attributes:
        name: short lower-case identifier, unique within its group.
        dtype: torch dtype name without the prefix, e.g. `"bfloat16"`, `"float8_e4m3fn"`.
        elems: elements per token and head (`head_dim` for `k` and `v`).
    """

    name: str
    dtype: str
    elems: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype named by `dtype`."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise SpecError(f"plane {self.name!r}: {self.dtype!r} is not a torch dtype; use a name such as 'bfloat16'")
        return found

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.torch_dtype.itemsize


class HitRule(msgspec.Struct, frozen=True):
    """The chunks of a group that must be present for a hit that ends at a given token boundary.

    - `all`: every chunk before the boundary (full attention, MLA).
    - `trailing`: the chunks that cover the last `window` tokens (sliding-window attention; `window` is the number of
      *previous* tokens the next token attends to, i.e. `sliding_window - 1`).
    - `state_at`: the object of exactly the chunk that ends at the boundary (Mamba-like recurrent state).
    - `whole`: the one object stored with the first chunk (cross attention).
    """

    kind: Literal["all", "trailing", "state_at", "whole"] = "all"
    window: int = 0


ALL = HitRule("all")


def trailing(window: int) -> HitRule:
    """Returns the rule of a sliding-window group whose next token attends to `window` previous tokens."""
    if window < 1:
        raise SpecError(f"a trailing window must be at least 1 token, not {window}")
    return HitRule("trailing", window)


class LayerGroup(msgspec.Struct, frozen=True):
    """Layers that share planes, geometry and hit rule.

    Attributes:
        name: a label, e.g. `"full"` or `"sliding"`.
        layers: global indices of the group's layers in the whole model, ascending, not necessarily consecutive.
        planes: the kinds of value that each layer holds per token and head.
        kv_heads: number of kv heads of the whole model (1 for MLA), before tensor-parallel sharding.
        rule: the chunks of this group that a hit needs.
    """

    name: str
    layers: tuple[int, ...]
    planes: tuple[Plane, ...]
    kv_heads: int
    rule: HitRule = ALL


class Rect(msgspec.Struct, frozen=True, order=True):
    """The rectangle of layers × kv heads held by one rank, as two half-open ranges of global indices.

    A group's layers outside `layers` belong to other ranks.
    """

    layers: tuple[int, int]
    heads: tuple[int, int]


class Numerics(msgspec.Struct, frozen=True):
    """What determines how KV is rounded, but not what it means. Part of the namespace unless sharing is semantic."""

    engine: str = ""
    engine_version: str = ""
    attention_backend: str = ""
    isa: str = ""
    dtype: str = ""
    quantization: str = ""
    tp: int = 1
    pp: int = 1
    extra: tuple[tuple[str, str], ...] = ()


def host_isa() -> str:
    """Returns the machine, the vector extension that torch dispatches to, and environment variables that choose arithmetic.

    For example `x86_64-AVX512`, or `x86_64-AVX512 ONEDNN_MAX_CPU_ISA=AVX2`.
    """
    switches = "".join(f" {name}={value}" for name, value in environment_switches())
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}{switches}"


class KVSpec(msgspec.Struct, frozen=True):
    """The KV cache of one rank. Build it with `uniform`, `of_groups` or from explicit groups followed by `validate`.

    Attributes:
        model: model identity, see `lmcache.keys.model_identity`; any stable string.
        groups: at least one layer group; the groups' layers are disjoint.
        rects: one rectangle per group: the part held by this rank.
        numerics: see `Numerics`.
        meaning: digest of what the model computes besides its weights (rope, windows, KV scales, …), see
            `lmcache.numerics.meaning_of`. Part of every namespace; empty if `model` covers it.
    """

    model: str
    groups: tuple[LayerGroup, ...]
    rects: tuple[Rect, ...]
    numerics: Numerics = Numerics()
    meaning: str = ""

    @classmethod
    def uniform(
        cls,
        model: str,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | str,
        v_head_dim: int | None = None,
        numerics: Numerics | None = None,
        meaning: str = "",
    ) -> KVSpec:
        """Returns a spec with one group of `layers` full-attention layers with planes `k` and `v`, all on one rank."""
        name = dtype_name(dtype)
        planes = (Plane("k", name, head_dim), Plane("v", name, v_head_dim or head_dim))
        group = LayerGroup("full", tuple(range(layers)), planes, kv_heads)
        return cls.of_groups(model, (group,), numerics or Numerics(isa=host_isa(), dtype=name), meaning)

    @classmethod
    def of_groups(
        cls, model: str, groups: Sequence[LayerGroup], numerics: Numerics | None = None, meaning: str = ""
    ) -> KVSpec:
        """Returns a spec whose only rank holds all of every group."""
        rects = tuple(Rect((0, max(g.layers, default=-1) + 1), (0, g.kv_heads)) for g in groups)
        spec = cls(model, tuple(groups), rects, numerics or Numerics(isa=host_isa()), meaning)
        spec.validate()
        return spec

    def shard(self, *, layers: tuple[int, int] | None = None, tp_rank: int = 0, tp_size: int = 1) -> KVSpec:
        """Returns the spec of one rank: pipeline stage `layers` (global, half-open) and head shard `tp_rank` of `tp_size`.

        Groups with fewer kv heads than ranks are replicated, as in engines (MLA: one head on every rank).
        """
        if not 0 <= tp_rank < tp_size:
            raise SpecError(f"tp_rank must be in [0, {tp_size}), not {tp_rank}")
        rects = []
        for group, rect in zip(self.groups, self.rects, strict=True):
            heads = (0, group.kv_heads)
            if group.kv_heads >= tp_size:
                if group.kv_heads % tp_size:
                    raise SpecError(
                        f"group {group.name!r} has {group.kv_heads} kv heads, not divisible by tp_size={tp_size}"
                    )
                per = group.kv_heads // tp_size
                heads = (tp_rank * per, (tp_rank + 1) * per)
            elif tp_size % group.kv_heads:
                raise SpecError(f"tp_size={tp_size} is not a multiple of group {group.name!r}'s {group.kv_heads} heads")
            else:
                head = tp_rank // (tp_size // group.kv_heads)
                heads = (head, head + 1)
            rects.append(Rect(layers or rect.layers, heads))
        spec = msgspec.structs.replace(self, rects=tuple(rects))
        spec.validate()
        return spec

    def validate(self) -> None:
        """Checks the spec.

        Raises:
            SpecError: the first inconsistency.
        """
        if not self.groups:
            raise SpecError("a KVSpec needs at least one layer group")
        if len(self.rects) != len(self.groups):
            raise SpecError(f"{len(self.groups)} groups need as many rects, got {len(self.rects)}")
        seen: dict[int, str] = {}
        for group, rect in zip(self.groups, self.rects, strict=True):
            where = f"group {group.name!r}"
            if not group.layers or list(group.layers) != sorted(set(group.layers)) or group.layers[0] < 0:
                raise SpecError(f"{where}: layers must be ascending, distinct and not negative, got {group.layers}")
            for layer in group.layers:
                if layer in seen:
                    raise SpecError(f"{where}: layer {layer} already belongs to group {seen[layer]!r}")
                seen[layer] = group.name
            if group.kv_heads < 1:
                raise SpecError(f"{where}: kv_heads must be at least 1, not {group.kv_heads}")
            if not group.planes or len({p.name for p in group.planes}) != len(group.planes):
                raise SpecError(f"{where}: needs planes with distinct names, got {[p.name for p in group.planes]}")
            for plane in group.planes:
                if plane.elems < 1:
                    raise SpecError(f"{where}: plane {plane.name!r} needs at least 1 element, not {plane.elems}")
                _ = plane.torch_dtype
            if group.rule.kind == "trailing" and group.rule.window < 1:
                raise SpecError(f"{where}: a trailing window must be at least 1 token, not {group.rule.window}")
            (l0, l1), (h0, h1) = rect.layers, rect.heads
            if not (0 <= h0 < h1 <= group.kv_heads):
                raise SpecError(f"{where}: heads [{h0}, {h1}) lie outside [0, {group.kv_heads})")
            if not (0 <= l0 < l1):
                raise SpecError(f"{where}: layers [{l0}, {l1}) is not a range")

    def local_layers(self, group: int) -> tuple[int, ...]:
        """Returns the global indices of the layers of `group` on this rank, ascending."""
        low, high = self.rects[group].layers
        return tuple(layer for layer in self.groups[group].layers if low <= layer < high)

    def local_heads(self, group: int) -> int:
        """Returns the number of kv heads of `group` on this rank."""
        low, high = self.rects[group].heads
        return high - low

    def bytes_per_token(self, group: int) -> int:
        """Returns the bytes of KV per token of `group` on this rank."""
        per_head = sum(p.elems * p.itemsize for p in self.groups[group].planes)
        return per_head * self.local_heads(group) * len(self.local_layers(group))

    def object_bytes(self, group: int, tokens: int) -> int:
        """Returns the payload bytes of an object of `tokens` tokens of `group` on this rank; the same in all (dense) orders."""
        return self.bytes_per_token(group) * tokens


def dtype_name(dtype: torch.dtype | str) -> str:
    """Converts `torch.bfloat16` or `"bfloat16"` to `"bfloat16"`."""
    name = str(dtype).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise SpecError(f"{dtype!r} is not a torch dtype; use e.g. torch.bfloat16 or 'bfloat16'")
    return name
