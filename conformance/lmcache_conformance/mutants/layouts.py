"""Wrongly declared layouts, and gathers and scatters of the wrong memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lmcache.layout import BoundKV, ObjectLayout, gather, scatter, translate
from lmcache_conformance.labs.engine_layouts import LABS, Lab, LabLayoutTests, ambiguous
from lmcache_conformance.mutants import mutant


@mutant(row="layout misread: with 2 kv heads two layouts have the same shape", project="LMCache #4463 #4467")
class MutantHeadsForPlanes(LabLayoutTests):
    """The engine's `[block, slot, 2, 2·dim]` is K and V, each of all heads; it is declared as heads, each with K and V."""

    variants = ("ambiguous",)

    def make(self, variant: str) -> Lab:
        return replace(ambiguous("kv (head dim)"), axes="block slot head (kv dim)")


@mutant(row="layout misread: with 2 kv heads two layouts have the same shape", project="dynamo #14416")
class MutantPlanesForHeads(LabLayoutTests):
    """The engine's `[block, slot, 2, 2·dim]` is heads, each with K and V; it is declared as K and V, each of all heads."""

    variants = ("ambiguous",)

    def make(self, variant: str) -> Lab:
        return replace(ambiguous("head (kv dim)"), axes="block slot kv (head dim)")


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantAmxReadAsVec(LabLayoutTests):
    """Pages packed for AMX are declared as packed for other instruction sets: same shape, other order inside a block."""

    variants = ("vllm cpu amx",)

    def make(self, variant: str) -> Lab:
        return replace(LABS[variant](), axes={"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"})


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantNativeReadAsCanonical(LabLayoutTests):
    """Copies native bytes as if they were canonical, without undoing the writer's packing."""

    variants = ("vllm cpu amx",)

    def translate(
        self, src: torch.Tensor, src_layout: ObjectLayout, dst: torch.Tensor, dst_layout: ObjectLayout
    ) -> None:
        dst.copy_(src)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantLoadsIntoBlockZero(LabLayoutTests):
    """Scatters the first token with slot −1 to slot 0."""

    variants = ("vllm packed LBHNC", "sglang mha")

    def scatter(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> None:
        slots = slots.clone()
        missing = (slots == -1).nonzero().flatten()
        if len(missing) and not bool((slots == 0).any()):
            slots[missing[0]] = 0
        scatter(srcs, layout, kv, 0, slots, layers)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantStoresBlockZero(LabLayoutTests):
    """Gathers slot 0 where a slot is −1."""

    variants = ("vllm packed LBHNC", "sglang mha")

    def gather(
        self,
        kv: BoundKV,
        slots: torch.Tensor,
        outs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        layers: slice | None = None,
    ) -> None:
        gather(kv, 0, torch.where(slots == -1, 0, slots) if slots.dtype == torch.int64 else slots, outs, layout, layers)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantLastBlocksFirst(LabLayoutTests):
    """Pairs objects with slots in reverse order."""

    variants = ("vllm packed LBHNC", "hf")

    def gather(
        self,
        kv: BoundKV,
        slots: torch.Tensor,
        outs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        layers: slice | None = None,
    ) -> None:
        gather(kv, 0, slots, outs[::-1], layout, layers)


@mutant(row="side state (sliding window, Mamba, sparse index) not restored with the hit", project="SGLang #38031")
class MutantScalesStayBehind(LabLayoutTests):
    """Scatters fp8 values without the plane `scale`."""

    variants = ("fp8 with scales",)

    def scatter(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> None:
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
