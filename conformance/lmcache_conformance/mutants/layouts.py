"""Layouts that are not what they say, and movers that touch what they should not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lmcache.layout import BoundKV, ObjectLayout, gather, scatter, translate
from lmcache_conformance.labs.engine_layouts import LABS, Lab, LabLayoutTests, ambiguous
from lmcache_conformance.mutants import mutant


@mutant(row="layout misread: with 2 kv heads two layouts have the same shape", project="LMCache #4463 #4467")
class MutantHeadsForPlanes(LabLayoutTests):
    """The engine has `[block, slot, 2, 2·dim]` as K and V of heads; it is read as heads of K‖V."""

    variants = ("ambiguous",)

    def make(self, variant: str) -> Lab:
        """Right tensors, wrong words."""
        return replace(ambiguous("kv (head dim)"), axes="block slot head (kv dim)")


@mutant(row="layout misread: with 2 kv heads two layouts have the same shape", project="dynamo #14416")
class MutantPlanesForHeads(LabLayoutTests):
    """The other way round."""

    variants = ("ambiguous",)

    def make(self, variant: str) -> Lab:
        """Right tensors, wrong words."""
        return replace(ambiguous("head (kv dim)"), axes="block slot kv (head dim)")


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantAmxReadAsVec(LabLayoutTests):
    """Pages packed for AMX are read as the other instruction sets pack them: same shape, other order inside a block."""

    variants = ("vllm cpu amx",)

    def make(self, variant: str) -> Lab:
        """Right tensors, wrong words."""
        return replace(LABS[variant](), axes={"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"})


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantNativeReadAsCanonical(LabLayoutTests):
    """Whoever reads takes native bytes for canonical ones: the writer's packing is not undone."""

    variants = ("vllm cpu amx",)

    def translate(
        self, src: torch.Tensor, src_layout: ObjectLayout, dst: torch.Tensor, dst_layout: ObjectLayout
    ) -> None:
        """A plain copy."""
        dst.copy_(src)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantLoadsIntoBlockZero(LabLayoutTests):
    """Where a slot is −1 something is written all the same, to slot 0."""

    variants = ("vllm packed LBHNC", "sglang mha")

    def scatter(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> None:
        """−1 is taken for 0, for the first token that has no place."""
        slots = slots.clone()
        missing = (slots == -1).nonzero().flatten()
        if len(missing) and not bool((slots == 0).any()):
            slots[missing[0]] = 0
        scatter(srcs, layout, kv, 0, slots, layers)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantStoresBlockZero(LabLayoutTests):
    """Where a slot is −1 something is read all the same: whatever lies in slot 0."""

    variants = ("vllm packed LBHNC", "sglang mha")

    def gather(
        self,
        kv: BoundKV,
        slots: torch.Tensor,
        outs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        layers: slice | None = None,
    ) -> None:
        """−1 is taken for 0."""
        gather(kv, 0, torch.where(slots == -1, 0, slots) if slots.dtype == torch.int64 else slots, outs, layout, layers)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantLastBlocksFirst(LabLayoutTests):
    """Objects are paired with slots from the end."""

    variants = ("vllm packed LBHNC", "hf")

    def gather(
        self,
        kv: BoundKV,
        slots: torch.Tensor,
        outs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        layers: slice | None = None,
    ) -> None:
        """The last object first."""
        gather(kv, 0, slots, outs[::-1], layout, layers)


@mutant(row="side state (sliding window, Mamba, sparse index) not restored with the hit", project="SGLang #38031")
class MutantScalesStayBehind(LabLayoutTests):
    """fp8 values move, their scales do not."""

    variants = ("fp8 with scales",)

    def scatter(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> None:
        """Everything but the plane `scale`."""
        now = [torch.empty_like(src) for src in srcs]
        named = slots[slots >= 0]
        if slots.shape != (len(srcs) * layout.tokens,) or len(named) != len(slots):
            scatter(srcs, layout, kv, 0, slots, layers)
            return
        canonical = ObjectLayout.canonical(kv.spec, 0, layout.tokens)
        start = canonical.places["scale"].addresses[0].base
        gather(kv, 0, slots, now, canonical)
        mixed = []
        for src, old in zip(srcs, now, strict=True):
            wanted = torch.empty_like(src)
            translate(src, layout, wanted, canonical)
            mixed.append(torch.cat([wanted[:start], old[start:]]))
        scatter(mixed, canonical, kv, 0, slots, layers)
