"""Stores and loads give the right bytes in every order that streams and events allow, and no two accesses are unordered."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowlab import copy_rows
from simulated import Event, OrderError, Simulated

from lmcache_kernels.pipeline import Completion, ObjectShape, Pipeline, pieces
from lmcache_kernels.rowcopy import Ints, RowCopy
from lmcache_kernels.streams import Touches

LAYERS, PAGES, PAGE, UNITS = 3, 12, 256, 2
CPU = torch.device("cpu")


class Lab:
    """Pages of several layers in simulated device memory, an engine that writes them, and objects of two pages on the host.

    With `planes` = 2, K and V of a page are separate in the object, as in canonical order.
    """

    def __init__(self, streams: Simulated, planes: int, *, staging: int = 1, backlog: int = 1 << 30) -> None:
        self.streams = streams
        self.planes = planes
        self.pages = torch.zeros(LAYERS * PAGES * PAGE, dtype=torch.uint8)
        self.truth = self.pages.clone()  # content of the pages once everything enqueued so far is done
        region = LAYERS * UNITS * PAGE // planes
        self.shape = ObjectShape(
            LAYERS * UNITS * PAGE, LAYERS, tuple((i * region, region // LAYERS) for i in range(planes))
        )
        self.staging: list[torch.Tensor] = []
        self.pipeline = Pipeline(
            streams,
            CPU,
            copy_rows,
            self._engine,
            staging=self._memory,
            staging_bytes=staging,
            backlog_bytes=backlog,
            dma_bytes=PAGE,
        )

    def _memory(self, nbytes: int) -> torch.Tensor:
        self.staging.append(torch.full((nbytes,), 0xAA, dtype=torch.uint8))
        return self.staging[-1]

    def _engine(self, dst: Ints, src: Ints, nbytes: Ints, **_: object) -> None:
        for d, s, n in zip(dst.tolist(), src.tolist(), nbytes.tolist(), strict=True):
            ctypes.memmove(d, s, n)

    def copies(self, pages: Sequence[int]) -> list[RowCopy]:
        """Copies between these pages and objects of two pages each."""
        objects, base = len(pages) // UNITS, self.pages.data_ptr()
        half = PAGE // self.planes
        whole = RowCopy(
            base + np.arange(LAYERS, dtype=np.int64) * PAGES * PAGE,
            np.array(pages, dtype=np.int64).reshape(objects, UNITS) * PAGE,
            np.arange(objects, dtype=np.int64) * self.shape.nbytes,
            np.arange(LAYERS, dtype=np.int64) * UNITS * half,
            np.arange(UNITS, dtype=np.int64) * half,
            ((half, 1, 1),),
        )
        regions = [offset for offset, _ in self.shape.regions]
        return [
            replace(whole, a_base=whole.a_base + i * half, b_layers=whole.b_layers + offset)
            for i, offset in enumerate(regions)
        ]

    def rows(self, pages: Sequence[int]) -> torch.Tensor:
        """Offsets of these pages in all layers, `(layers, pages)`."""
        return torch.tensor([[(layer * PAGES + page) * PAGE for page in pages] for layer in range(LAYERS)])

    def compute(self, pages: Sequence[int], seed: int) -> None:
        """The engine writes pages."""
        fresh = torch.from_numpy(np.random.default_rng(seed).integers(1, 256, PAGE, dtype=np.uint8))
        offsets = self.rows(pages).reshape(-1).tolist()

        def work() -> None:
            for at in offsets:
                self.pages[at : at + PAGE] = fresh

        base = self.pages.data_ptr()
        self.streams.launch("compute", work, lambda: Touches(writes=[(base + at, PAGE) for at in offsets]))
        for at in offsets:
            self.truth[at : at + PAGE] = fresh

    def objects_of(self, pages: Sequence[int]) -> list[torch.Tensor]:
        """Expected content of objects made of these pages."""
        made = [torch.zeros(self.shape.nbytes, dtype=torch.uint8) for _ in range(len(pages) // UNITS)]
        for copy in self.copies(pages):
            for a, b in zip(*(side.tolist() for side in copy.rows()), strict=True):
                at, number, inside = a - self.pages.data_ptr(), b // self.shape.nbytes, b % self.shape.nbytes
                made[number][inside : inside + copy.run] = self.truth[at : at + copy.run]
        return made

    def store(self, pages: Sequence[int]) -> tuple[Completion, list[torch.Tensor], list[torch.Tensor]] | None:
        outs = [torch.zeros(self.shape.nbytes, dtype=torch.uint8) for _ in range(len(pages) // UNITS)]
        wanted = self.objects_of(pages)
        completion = self.pipeline.store(self.copies(pages), self.shape, outs)
        return None if completion is None else (completion, outs, wanted)

    def load(
        self,
        pages: Sequence[int],
        objects: Sequence[torch.Tensor],
        *,
        direct: bool,
        after: Event | None = None,
    ) -> Completion:
        srcs = [item.clone() for item in objects]
        completion = self.pipeline.load(
            self.copies(pages), self.shape, srcs, pages=[self.pages], direct=direct, after=after
        )
        for copy in self.copies(pages):
            for a, b in zip(*(side.tolist() for side in copy.rows()), strict=True):
                at, number, inside = a - self.pages.data_ptr(), b // self.shape.nbytes, b % self.shape.nbytes
                self.truth[at : at + copy.run] = srcs[number][inside : inside + copy.run]
        return completion

    def read(self, objects: Sequence[torch.Tensor]) -> None:
        """The host reads objects."""
        self.streams.host(reads=[(item.data_ptr(), item.numel()) for item in objects])

    def finish(self) -> None:
        while self.streams.step():
            pass
        assert torch.equal(self.pages, self.truth)


PAGE_LISTS = st.lists(st.integers(0, PAGES - 1), min_size=UNITS, max_size=3 * UNITS, unique=True).map(
    lambda pages: pages[: len(pages) // UNITS * UNITS]
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([1, 2]), st.sampled_from([1, 12_000, 100_000]))
def test_any_history_gives_the_right_bytes_and_leaves_nothing_to_chance(
    data: st.DataObject, planes: int, staging: int
) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    lab = Lab(Simulated(choose=rng.randrange), planes, staging=staging)
    kept: list[torch.Tensor] = []
    under_way: list[tuple[Completion, list[torch.Tensor], list[torch.Tensor]]] = []
    loading: list[tuple[Completion, set[int]]] = []
    for number in range(data.draw(st.integers(1, 10))):
        pages = data.draw(PAGE_LISTS)
        action = data.draw(st.sampled_from(["compute", "store", "load", "go on", "arrive"]))
        if action in ("compute", "store", "load"):  # an engine uses pages once their load is complete
            for completion, loaded in loading:
                if loaded & set(pages):
                    completion.wait()
        if action == "compute":
            lab.compute(pages, number)
        elif action == "store":
            made = lab.store(pages)
            assert made is not None
            under_way.append(made)
        elif action == "load" and len(kept) >= len(pages) // UNITS:
            loading.append((lab.load(pages, kept, direct=data.draw(st.booleans())), set(pages)))
        elif action == "go on":
            for _ in range(rng.randrange(8)):
                lab.streams.step()
        elif under_way:
            completion, outs, wanted = under_way.pop(rng.randrange(len(under_way)))
            completion.wait()
            assert completion.done()
            lab.read(outs)
            assert all(map(torch.equal, outs, wanted))
            kept = outs + kept
    for completion, outs, wanted in under_way:
        completion.wait()
        lab.read(outs)
        assert all(map(torch.equal, outs, wanted))
    lab.finish()


def story(streams: Simulated, planes: int = 2, *, wait: bool = True, loaded: bool = True, direct: bool = False) -> None:
    """Runs every step that needs an event: write, store, overwrite, store again through the same ring, load twice, overwrite.

    Args:
        wait, loaded: wait for stores before their objects are read, and for loads before their pages are written.
    """
    lab = Lab(streams, planes)
    lab.compute(range(PAGES), 1)
    first = lab.store([0, 1, 2, 3])
    lab.compute(range(PAGES), 2)
    second = lab.store([0, 1, 2, 3])
    assert first is not None
    assert second is not None
    for completion, outs, wanted in (first, second):
        if wait:
            completion.wait()
        lab.read(outs)
        assert all(map(torch.equal, outs, wanted))
    lab.compute([4, 5, 6, 7], 3)
    loads = [lab.load(pages, first[1], direct=direct) for pages in ([4, 5, 6, 7], [8, 9, 10, 11])]
    for completion in loads if loaded else ():
        completion.wait()
    lab.compute([4, 5], 4)
    lab.finish()


def both_roads(forget: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Runs the story through staging memory and directly; returns the pairs (waiting stream, stream of the event)."""
    used: set[tuple[str, str]] = set()
    for direct in (False, True):
        streams = Simulated(forget=forget)
        story(streams, direct=direct)
        used |= streams.used
    return used


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_the_story_itself_is_sound(planes: int, direct: bool) -> None:
    for seed in range(20):
        story(Simulated(choose=random.Random(seed).randrange), planes, direct=direct)


FORGOTTEN = {
    "the copy to the host starts before the gather": ("store", "compute"),
    "the gather overwrites a part of the ring before it is copied out": ("compute", "store"),
    "a load starts while the engine still uses the pages": ("load", "compute"),
    "a part of the ring is scattered before it is filled": ("load", "h2d"),
    "a part of the ring is refilled before it is scattered": ("h2d", "load"),
}


@pytest.mark.parametrize("mistake", FORGOTTEN)
def test_an_event_that_is_left_out_is_found(mistake: str) -> None:
    with pytest.raises(OrderError):
        both_roads({FORGOTTEN[mistake]})


def test_long_pieces_that_go_straight_wait_for_the_pages() -> None:
    with pytest.raises(OrderError):
        story(Simulated(forget={("h2d", "compute")}), planes=1, direct=True)


def test_every_wait_of_the_pipeline_is_one_of_those_that_were_left_out() -> None:
    assert both_roads(set()) == {*FORGOTTEN.values(), ("h2d", "compute")}


def test_a_gather_off_the_engines_stream_is_found() -> None:
    """The gather of a store runs on a stream that is not ordered after the engine's writes."""

    class Elsewhere(Simulated):
        def compute(self) -> str:
            return "elsewhere"

    with pytest.raises(OrderError, match="elsewhere reads what compute writes"):
        story(Elsewhere())


def test_the_host_reading_too_early_is_found() -> None:
    with pytest.raises(OrderError, match="host reads what store writes"):
        story(Simulated(), wait=False)


@pytest.mark.parametrize("direct", [False, True])
def test_the_engine_computing_before_a_load_is_complete_is_found(direct: bool) -> None:
    with pytest.raises(OrderError, match=r"compute writes what (load|h2d) writes"):
        story(Simulated(), planes=1, loaded=False, direct=direct)


def test_an_order_that_is_not_kept_shows_in_the_bytes_too() -> None:
    """The checker is not the only evidence: without it, some schedule gives wrong bytes."""

    class Unchecked(Simulated):
        def _check(self, stream, clock, touches) -> None:  # type: ignore[no-untyped-def]
            pass

    def wrong(seed: int) -> bool:
        try:
            story(Unchecked(choose=random.Random(seed).randrange, forget={("store", "compute")}))
        except AssertionError:
            return True
        return False

    assert any(wrong(seed) for seed in range(50))


def test_a_link_too_far_behind_refuses_and_recovers() -> None:
    lab = Lab(Simulated(), 1, backlog=3 * LAYERS * UNITS * PAGE)
    lab.compute(range(PAGES), 1)
    first = lab.store([0, 1, 2, 3])
    assert first is not None
    launched = {name: len(queue) for name, queue in lab.streams.queues.items()}
    assert lab.store([4, 5, 6, 7]) is None
    assert launched == {name: len(queue) for name, queue in lab.streams.queues.items()}
    first[0].wait()
    again = lab.store([4, 5, 6, 7])
    assert again is not None
    again[0].wait()
    assert all(map(torch.equal, again[1], again[2]))


def test_staging_memory_is_bounded_and_taken_once() -> None:
    lab = Lab(Simulated(), 2, staging=16384)
    for seed in range(5):
        lab.compute(range(PAGES), seed)
        made = lab.store([0, 1, 2, 3])
        assert made is not None
        made[0].wait()
        lab.load([4, 5, 6, 7], made[1], direct=False).wait()
    assert [memory.numel() for memory in lab.staging] == [8192, 8192]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 400),
)
def test_pieces_cover_every_byte_once_and_layers_in_order(
    sizes: list[int], layers: int, objects: int, most: int
) -> None:
    regions, start = [], 0
    for size in sizes:
        regions.append((start, size))
        start += size * layers
    seen: list[tuple[int, int]] = []
    first_layers = []
    for piece in pieces(ObjectShape(start, layers, tuple(regions)), objects, most):
        assert piece.nbytes <= most or (len(piece.layers), len(piece.objects)) == (1, 1)
        offset, nbytes = piece.span
        seen += [(item, byte) for item in piece.objects for byte in range(offset, offset + nbytes)]
        first_layers.append(piece.layers.start)
    assert sorted(seen) == [
        (item, offset + byte) for item in range(objects) for offset, size in regions for byte in range(layers * size)
    ]
    assert first_layers == sorted(first_layers)
