"""The contract of a layout: gather, scatter and translate access exactly the bytes that the engine itself would.

    class TestMyEnginesLayout(LayoutTests):
        def make(self, variant):
            return MyMemory(...)  # an `EngineMemory`: tensors, their axes, and your own access to one token

The oracle is your engine's own index arithmetic, one token at a time; `lmcache.layout` is not used to judge itself. Memory
is filled with random *bits*, so that NaN payloads, −0, infinities and denormals all occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pytest
import torch

from lmcache.errors import LayoutError, LMCacheError, SlotError
from lmcache.format.codec import ObjectCodec
from lmcache.keys import ObjectId
from lmcache.layout import BoundKV, Layout, ObjectLayout, PagedKV, gather, scatter, translate
from lmcache.layout.proof import prove
from lmcache.plan import Status
from lmcache.spec import KVSpec
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.contract import Level
from lmcache_conformance.runner.marks import level


class EngineMemory(Protocol):
    """An engine's KV memory with one layer group, and the engine's own access to single tokens.

    Attributes:
        axes: the axis string under test, or one per plane.
        block_tokens: tokens per page; None if pages are a dimension of the tensors.
        spec: has one layer group.
        tensors: as passed to `PagedKV`.
    """

    axes: str | Mapping[str, str]
    block_tokens: int | None
    spec: KVSpec
    tensors: Any

    def read_token(self, plane: str, layer: int, slot: int) -> torch.Tensor:
        """Returns `(kv heads, elements)` of one token, read by indexing the tensors."""
        ...

    def write_token(self, plane: str, layer: int, slot: int, values: torch.Tensor) -> None:
        """Writes `(kv heads, elements)` of one token, in the plane's dtype, as the engine does."""
        ...


class Memory:
    """An `EngineMemory` filled with random bits, and helpers for the tests. Tokens are accessed only through the engine."""

    def __init__(self, engine: EngineMemory, seed: int) -> None:
        self.engine = engine
        self.spec = engine.spec
        self.storages = storages(engine.tensors)
        generator = torch.Generator().manual_seed(seed)
        for storage in self.storages:
            storage.copy_(torch.randint(0, 256, storage.shape, generator=generator, dtype=torch.uint8))
        layout = Layout.parse(engine.axes, block_tokens=engine.block_tokens)
        self.bound: BoundKV = PagedKV(engine.tensors, layout).bind(engine.spec)
        self.slots = self.bound.num_slots(0)
        self.block = self.bound.block_tokens(0)
        paged = 1 < self.block <= 64 and self.slots // self.block >= 4
        self.tokens = 2 * self.block if paged and not self.bound.groups[0].runs else 8
        """Tokens per object."""
        self.objects = max(1, min(3, self.slots // self.tokens - 1))
        """Number of objects that fit while leaving other slots unused."""

    def canonical(self, slots: torch.Tensor, layers: Sequence[int] | None = None) -> torch.Tensor:
        """Returns the canonical bytes of one object of these slots, token by token."""
        parts = []
        for plane in self.spec.groups[0].planes:
            for layer in range(self._layers) if layers is None else layers:
                tokens = [self.engine.read_token(plane.name, layer, int(slot)) for slot in slots]
                parts.append(torch.stack([_bits(token) for token in tokens]).reshape(-1))
        return torch.cat(parts)

    def write(self, slots: torch.Tensor, canonical: torch.Tensor, layers: Sequence[int] | None = None) -> None:
        """Writes the canonical bytes of one object to these slots; slots of −1 are skipped."""
        at = 0
        heads = self.spec.local_heads(0)
        for plane in self.spec.groups[0].planes:
            for layer in range(self._layers) if layers is None else layers:
                for slot in slots.tolist():
                    size = heads * plane.elems * plane.itemsize
                    values = canonical[at : at + size].clone().view(plane.torch_dtype).view(heads, plane.elems)
                    at += size
                    if slot >= 0:
                        self.engine.write_token(plane.name, layer, slot, values)

    def snapshot(self) -> list[torch.Tensor]:
        """Returns a copy of every byte."""
        return [storage.clone() for storage in self.storages]

    def same(self, snapshot: Sequence[torch.Tensor]) -> bool:
        """Returns whether every byte is as in the snapshot."""
        return all(torch.equal(a, b) for a, b in zip(snapshot, self.storages, strict=True))

    def after(self, slots: torch.Tensor, payloads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns every byte as it would be after the engine itself wrote these objects. Leaves the memory unchanged."""
        before = self.snapshot()
        for mine, payload in zip(slots.view(-1, self.tokens), payloads, strict=True):
            self.write(mine, payload)
        wanted = self.snapshot()
        for storage, content in zip(self.storages, before, strict=True):
            storage.copy_(content)
        return wanted

    def choose(self, kind: str, count: int, seed: int = 0) -> torch.Tensor:
        """Returns a slot mapping of `count` tokens.

        Args:
            kind: `ordered`; whole `pages` in random order; single slots `scattered`; or `shifted` by one inside pages.
            count: number of tokens.
            seed: of the random order.
        """
        generator = torch.Generator().manual_seed(seed)
        if kind == "ordered":
            return torch.arange(count)
        if kind == "shifted":
            return torch.arange(count) + (1 if count < self.slots else 0)
        if kind == "scattered" or count % self.block or self.bound.groups[0].runs:
            return torch.randperm(self.slots, generator=generator)[:count]
        pages = torch.randperm(self.slots // self.block, generator=generator)[: count // self.block]
        return (pages[:, None] * self.block + torch.arange(self.block)).reshape(-1)

    @property
    def _layers(self) -> int:
        return len(self.spec.local_layers(0))


KINDS = ("ordered", "pages", "scattered", "shifted")
ORDERS = ("canonical", "native")


class LayoutTests:
    """The contract of a layout. `gather`, `scatter` and `translate` are those of `lmcache.layout` unless overridden."""

    variants: tuple[str, ...] = ("",)
    """Arguments for `make`; every test runs once for each."""

    misreadings: tuple[str | Mapping[str, str], ...] = ()
    """Wrong axes that fit the shapes of the same tensors: the proof must reject each."""

    def make(self, variant: str) -> EngineMemory:
        """Returns new engine memory, with at least 24 slots and enough pages for two objects."""
        raise NotImplementedError

    def gather(
        self,
        kv: BoundKV,
        slots: torch.Tensor,
        outs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        layers: slice | None = None,
    ) -> None:
        """See `lmcache.layout.gather`, group 0."""
        gather(kv, 0, slots, outs, layout, layers)

    def scatter(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> None:
        """See `lmcache.layout.scatter`, group 0."""
        scatter(srcs, layout, kv, 0, slots, layers)

    def translate(
        self, src: torch.Tensor, src_layout: ObjectLayout, dst: torch.Tensor, dst_layout: ObjectLayout
    ) -> None:
        """See `lmcache.layout.translate`."""
        translate(src, src_layout, dst, dst_layout)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each test once per variant."""
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", self.variants)

    @pytest.fixture
    def memory(self, variant: str) -> Memory:
        """The engine's memory, filled with random bits."""
        return Memory(self.make(variant), seed=1)

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    @pytest.mark.parametrize("order", ORDERS)
    def test_gather_reads_what_the_engine_holds(self, memory: Memory, order: str) -> None:
        layout, canonical = self._layouts(memory, order)
        before = memory.snapshot()
        for kind in KINDS:
            slots = memory.choose(kind, memory.objects * memory.tokens)
            outs = [torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8) for _ in range(memory.objects)]
            self.gather(memory.bound, slots, outs, layout)
            for number, (out, mine) in enumerate(zip(outs, slots.view(-1, memory.tokens), strict=True)):
                case = f"object {number}, {kind} slots"
                self._equal(memory, self._as(out, layout, canonical), memory.canonical(mine), case)
        assert memory.same(before), "a gather changed the engine's memory"

    @level(Level.BYTES)
    @pytest.mark.parametrize("order", ORDERS)
    def test_scatter_writes_what_the_engine_reads_and_no_other_slot(self, memory: Memory, order: str) -> None:
        layout, canonical = self._layouts(memory, order)
        for seed, kind in enumerate(KINDS):
            slots = memory.choose(kind, memory.objects * memory.tokens, seed=5)
            payloads = _random(memory.objects, canonical.nbytes, seed)
            srcs = [self._as(payload, canonical, layout) for payload in payloads]
            wanted = memory.after(slots, payloads)
            self.scatter(srcs, layout, memory.bound, slots)
            for number, mine in enumerate(slots.view(-1, memory.tokens)):
                self._equal(memory, memory.canonical(mine), payloads[number], f"object {number}, {kind} slots")
            assert memory.same(wanted), f"{kind} slots: another slot changed"

    @level(Level.BYTES)
    @pytest.mark.parametrize("order", ORDERS)
    def test_a_slot_of_minus_one_is_never_written(self, memory: Memory, order: str) -> None:
        layout, canonical = self._layouts(memory, order)
        some = torch.rand(memory.tokens, generator=torch.Generator().manual_seed(3)) < 0.5
        first = torch.arange(memory.tokens) < 1
        page = torch.arange(memory.tokens) < memory.block
        every = torch.ones(memory.tokens, dtype=torch.bool)
        for seed, (kind, missing) in enumerate((kind, hole) for kind in KINDS for hole in (first, some, page, every)):
            named = torch.where(missing, -1, memory.choose(kind, memory.tokens, seed=6))
            [payload] = _random(1, canonical.nbytes, seed)
            wanted = memory.after(named, [payload])
            self.scatter([self._as(payload, canonical, layout)], layout, memory.bound, named)
            assert memory.same(wanted), f"slots {named.tolist()}: bytes outside the given slots changed"

    @level(Level.BYTES)
    @pytest.mark.parametrize("order", ORDERS)
    def test_copies_of_one_layer_access_that_layer_alone(self, memory: Memory, order: str) -> None:
        slots = memory.choose("pages", memory.tokens, seed=7)
        layout, canonical = self._layouts(memory, order)
        [payload] = _random(1, canonical.nbytes, 0)
        src = self._as(payload, canonical, layout)
        layers = len(memory.spec.local_layers(0))
        old = [memory.canonical(slots, [layer]) for layer in range(layers)]
        out = torch.zeros(layout.nbytes, dtype=torch.uint8)
        for layer in range(layers):
            self.gather(memory.bound, slots, [out], layout, slice(layer, layer + 1))
        self._equal(memory, self._as(out, layout, canonical), memory.canonical(slots), "gathered layer by layer")
        for layer in range(layers):
            self.scatter([src], layout, memory.bound, slots, slice(layer, layer + 1))
            for other in range(layer + 1, layers):
                assert torch.equal(memory.canonical(slots, [other]), old[other]), f"layer {layer} wrote layer {other}"
        self._equal(memory, memory.canonical(slots), payload, "scattered layer by layer")

    @level(Level.BYTES)
    def test_translation_keeps_every_byte_both_ways(self, memory: Memory) -> None:
        native, canonical = memory.bound.native(0, memory.tokens), self._layouts(memory, "canonical")[1]
        assert native.nbytes == canonical.nbytes == memory.spec.object_bytes(0, memory.tokens)
        [payload] = _random(1, canonical.nbytes, 0)
        there = self._as(payload, canonical, native)
        assert torch.equal(torch.sort(there)[0], torch.sort(payload)[0]), "bytes are lost or duplicated"
        assert torch.equal(self._as(there, native, canonical), payload)

    @level(Level.BYTES)
    def test_an_object_stored_in_native_order_can_be_read_in_canonical_order(self, memory: Memory) -> None:
        native, canonical = memory.bound.native(0, memory.tokens), self._layouts(memory, "canonical")[1]
        slots = memory.choose("pages", memory.tokens)
        out = torch.empty(native.nbytes, dtype=torch.uint8)
        self.gather(memory.bound, slots, [out], native)
        id = ObjectId(b"n" * 32, b"c" * 32, 0, memory.spec.rects[0], memory.tokens, 0)
        tier = MemoryTier()
        writer, reader = (ObjectCodec(memory.spec, memory.tokens, order=order) for order in ("native", "canonical"))
        assert writer.save(tier, id, out, native).status is Status.OK
        back = torch.empty(canonical.nbytes, dtype=torch.uint8)
        loaded = reader.load(tier, id, back, canonical, None)
        assert loaded.result.status is Status.OK, loaded.result.detail
        self._equal(memory, back, memory.canonical(slots), "written native, read canonical")

    # ---------------------------------------------------------------- wrong calls

    @level(Level.FAULTS)
    def test_wrong_slots_are_refused_before_anything_moves(self, memory: Memory) -> None:
        layout, _ = self._layouts(memory, "canonical")
        before = memory.snapshot()
        [payload] = _random(1, layout.nbytes, 0)
        right = memory.choose("ordered", memory.tokens)
        wrong = {
            "beyond the pool": torch.cat([right[:-1], torch.tensor([memory.slots])]),
            "below -1": torch.cat([right[:-1], torch.tensor([-2])]),
            "too few": right[:-1],
            "not whole numbers": right.to(torch.float32),
        }
        twice = {"named twice": torch.cat([right[:-1], right[:1]])}  # harmless when gathering
        missing = {"-1": torch.cat([right[:-1], torch.tensor([-1])])}  # allowed when scattering
        for name, slots in (wrong | twice).items():
            refused = _refused(lambda: self.scatter([payload], layout, memory.bound, slots))  # noqa: B023
            assert refused, f"scatter accepted slots {name}"
            assert memory.same(before), f"slots {name} were refused, but written all the same"
        for name, slots in (wrong | missing).items():
            out = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
            refused = _refused(lambda: self.gather(memory.bound, slots, [out], layout))  # noqa: B023
            assert refused, f"gather accepted slots {name}"
            assert bool((out == 0xAA).all()), f"slots {name} were refused, but read all the same"

    # ---------------------------------------------------------------- proof

    @level(Level.BYTES)
    def test_the_layout_is_proven_by_the_engines_own_writes_and_reads(self, memory: Memory) -> None:
        proof = self._prove(memory, memory.bound)
        assert proof.ok, f"not proven: {proof.reason}"

    @level(Level.BYTES)
    def test_the_proof_refuses_wrong_axes_of_the_same_shape(self) -> None:
        if not self.misreadings:
            pytest.skip("`misreadings` is empty: there are no other axes for the same tensors")
        for variant in self.variants:
            memory = Memory(self.make(variant), seed=1)
            for axes in self.misreadings:
                layout = Layout.parse(axes, block_tokens=memory.engine.block_tokens)
                wrong = PagedKV(memory.engine.tensors, layout).bind(memory.spec)
                assert not self._prove(memory, wrong).ok, f"{axes!r} was proven, but is not the layout of this memory"

    @level(Level.BYTES)
    def test_layouts_round_trip_through_their_description(self, memory: Memory) -> None:
        layout = Layout.parse(memory.engine.axes, block_tokens=memory.engine.block_tokens)
        assert Layout.from_description(layout.describe()) == layout
        for order in ORDERS:
            made = self._layouts(memory, order)[0]
            assert ObjectLayout.from_description(made.describe()) == made

    def _prove(self, memory: Memory, bound: BoundKV) -> Any:
        planes = [plane.name for plane in memory.spec.groups[0].planes]

        def write(_group: int, layer: int, slots: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
            for number, slot in enumerate(slots.tolist()):
                for plane in planes:
                    memory.engine.write_token(plane, layer, slot, values[plane][number])

        def read(_group: int, layer: int, slots: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                plane: torch.stack([memory.engine.read_token(plane, layer, slot) for slot in slots.tolist()])
                for plane in planes
            }

        scratch = torch.arange(max(2 * memory.tokens, 8) if memory.slots >= 2 * memory.tokens else memory.slots)
        return prove(bound, memory.spec, write, scratch, read=read)

    # ---------------------------------------------------------------- helpers

    def _layouts(self, memory: Memory, order: str) -> tuple[ObjectLayout, ObjectLayout]:
        canonical = ObjectLayout.canonical(memory.spec, 0, memory.tokens)
        return (canonical if order == "canonical" else memory.bound.native(0, memory.tokens)), canonical

    def _as(self, data: torch.Tensor, held: ObjectLayout, wanted: ObjectLayout) -> torch.Tensor:
        if held == wanted:
            return data
        out = torch.full((wanted.nbytes,), 0x55, dtype=torch.uint8)
        self.translate(data, held, out, wanted)
        return out

    def _equal(self, memory: Memory, got: torch.Tensor, wanted: torch.Tensor, case: str) -> None:
        if torch.equal(got, wanted):
            return
        at = int((got != wanted).nonzero()[0])
        wrong = int((got != wanted).sum())
        raise AssertionError(
            f"{case}: {wrong} of {len(wanted)} bytes are wrong, the first is byte {at} ({self._where(memory, at)}) "
            f"for axes {memory.engine.axes!r}"
        )

    def _where(self, memory: Memory, at: int) -> str:
        """Returns plane, layer, token, head and element of a canonical byte, in words."""
        layers, heads = len(memory.spec.local_layers(0)), memory.spec.local_heads(0)
        for plane in memory.spec.groups[0].planes:
            shape = (layers, memory.tokens, heads, plane.elems, plane.itemsize)
            size = layers * memory.tokens * heads * plane.elems * plane.itemsize
            if at < size:
                place = []
                for extent in reversed(shape):
                    at, digit = divmod(at, extent)
                    place.append(digit)
                _, elem, head, token, layer = place
                return f"plane {plane.name!r}, layer {layer}, token {token}, head {head}, element {elem}"
            at -= size
        return "past the end"


def _refused(call: Any) -> bool:
    """Returns whether a call raises `SlotError` or `LayoutError`."""
    try:
        call()
    except (SlotError, LayoutError):
        return True
    except LMCacheError as error:
        raise AssertionError(f"refused, but with {type(error).__name__}: {error}") from error
    return False


def _random(count: int, nbytes: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(99 + seed)
    return [torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8) for _ in range(count)]


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def all_tensors(tensors: Any) -> list[torch.Tensor]:
    """Returns the tensors in nested mappings and sequences, in order."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    parts = tensors.values() if isinstance(tensors, Mapping) else tensors
    return [tensor for part in parts for tensor in all_tensors(part)]


def storages(tensors: Any) -> list[torch.Tensor]:
    """Returns the memory of these tensors as bytes, each storage once."""
    found: dict[int, torch.Tensor] = {}
    for tensor in all_tensors(tensors):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
    return list(found.values())
