"""Rows copied by numpy equal naive index arithmetic, whatever becomes a loop, and no other byte changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pagelab import PAGES, Lab
from rowlab import bytes_at, copies, pairs

from lmcache_kernels import Dim, RowCopy, copy_rows_on_host, hostrows

INTO_A = pytest.mark.parametrize("into_a", [False, True], ids=["gather", "scatter"])


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Sets the number of threads, and uses them for copies of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(hostrows, "_BYTES_PER_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def noise(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def one_row(source: int, target: int, dims: tuple[Dim, ...]) -> RowCopy:
    """A copy of one row between two addresses."""
    zero = np.zeros(1, dtype=np.int64)
    return RowCopy(zero + source, zero.reshape(1, 1), zero + target, zero, zero, dims)


@INTO_A
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "block"), [(n, s) for n in PAGES for s in (1, 16, 32) if s % PAGES[n].slots == 0])
def test_a_page_becomes_canonical_and_comes_back(name: str, block: int, width: int, into_a: bool) -> None:
    heads, dim = 2, 16
    page, shape = PAGES[name], (block, heads, dim, width)
    row = block * heads * dim * width
    lab = Lab(page.dims(*shape), page.nbytes(*shape), row, layers=3, shift=block % 3, seed=block)
    wanted_a, wanted_b = lab.wanted(into_a)
    copy_rows_on_host([lab.copy], into_a=into_a)
    assert torch.equal(lab.a, wanted_a)
    assert torch.equal(lab.b, wanted_b)


@INTO_A
def test_planes_of_a_page_move_in_one_loop(into_a: bool) -> None:
    """Four copies of 8-byte rows, each directly after the previous one; the first two and last two are pages apart."""
    lab = Lab(((2, 64, 16), (8, 1, 1)), 128, 64, layers=2, objects=2, units=2)
    wanted_a, wanted_b = lab.a.clone(), lab.b.clone()
    planes = []
    for i in range(4):
        moved = replace(
            lab.copy,
            a_base=lab.copy.a_base + 8 * i,
            b_layers=lab.copy.b_layers + 32 * (i // 2) + 8 * (i % 2),
        )
        planes.append(moved)
        source, target = (lab.b, wanted_a) if into_a else (lab.a, wanted_b)
        for x, y, n in zip(*pairs(moved)[:2], itertools.repeat(moved.run), strict=False):
            at_a, at_b = int(x) - lab.a.data_ptr(), int(y) - lab.b.data_ptr()
            s, t = (at_b, at_a) if into_a else (at_a, at_b)
            target[t : t + n] = source[s : s + n]
    loops = [loop.dims for loop in hostrows.looped(planes)]
    assert len(loops) == 2
    assert all((2, 8, 8) in dims for dims in loops)
    crossed = replace(planes[1], b_layers=planes[1].b_layers[::-1].copy())
    assert len(list(hostrows.looped([planes[0], crossed]))) > 1
    crossed = replace(planes[1], a_base=planes[1].a_base[::-1].copy())
    assert len(list(hostrows.looped([planes[0], crossed]))) > 1
    copy_rows_on_host(planes, into_a=into_a)
    assert torch.equal(lab.a, wanted_a)
    assert torch.equal(lab.b, wanted_b)


@settings(max_examples=300, deadline=None)
@given(copy=copies(), into_a=st.booleans())
def test_any_rows(copy: RowCopy, into_a: bool) -> None:
    a, b = noise(200_000, 1), noise(200_000, 2)
    copy = replace(copy, a_base=copy.a_base + a.data_ptr(), b_base=copy.b_base - 90000 + 1000 + b.data_ptr())
    wanted_a, wanted_b = a.clone(), b.clone()
    at_a, at_b, nbytes = pairs(copy)
    written = (at_a if into_a else at_b)[:, None] + np.arange(nbytes)
    assume(len(np.unique(written)) == written.size)
    for x, y in zip((at_a - a.data_ptr()).tolist(), (at_b - b.data_ptr()).tolist(), strict=True):
        if into_a:
            wanted_a[x : x + nbytes] = b[y : y + nbytes]
        else:
            wanted_b[y : y + nbytes] = a[x : x + nbytes]
    copy_rows_on_host([copy], into_a=into_a)
    assert torch.equal(a, wanted_a)
    assert torch.equal(b, wanted_b)


@INTO_A
def test_no_objects_no_layers_no_resident_row(into_a: bool) -> None:
    none, one = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    copy_rows_on_host([], into_a=into_a)
    copy_rows_on_host([RowCopy(one, none.reshape(0, 1), none, one, one, ((8, 1, 1),))], into_a=into_a)
    copy_rows_on_host([RowCopy(none, one.reshape(1, 1), one, none, one, ((8, 1, 1),))], into_a=into_a)
    copy_rows_on_host([RowCopy(one, one.reshape(1, 1) - 1, one, one, one, ((8, 1, 1),))], into_a=into_a)


@INTO_A
def test_nothing_is_copied_aside_where_objects_lie_between_layers(
    into_a: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy compares bounds only: for it, a view over layers on both sides of the objects overlaps the objects."""
    memory = noise(8192, 3)
    start = memory.data_ptr()
    copy = RowCopy(
        start + np.arange(5, dtype=np.int64) * 1536,
        np.array([[64, 0], [128, 192]], dtype=np.int64),
        start + np.array([1000, 4136], dtype=np.int64),
        np.arange(5, dtype=np.int64) * 64,
        np.array([0, 32], dtype=np.int64),
        ((4, 16, 8), (8, 1, 1)),
    )
    assert [list(loops.layers) for loops in hostrows.looped([copy])] == [[0], [1], [2], [3, 4]]
    seen: list[bool] = []
    copyto = np.copyto

    def watched(target: np.ndarray, source: np.ndarray) -> None:
        seen.append(np.may_share_memory(target, source))
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", watched)
    wanted = memory.clone()
    for x, y in zip(*pairs(copy)[:2], strict=True):
        s, t = (int(y) - start, int(x) - start) if into_a else (int(x) - start, int(y) - start)
        wanted[t : t + 8] = memory[s : s + 8]
    copy_rows_on_host([copy], into_a=into_a)
    assert torch.equal(memory, wanted)
    assert seen
    assert not any(seen)


def arranged(sizes: list[int], order_a: list[int], order_b: list[int], run: int, gap: int) -> tuple[Dim, ...]:
    """Loops that are dense in two orders, except for a gap of `gap` runs after the second innermost loop on each side."""

    def strides(order: list[int]) -> dict[int, int]:
        out, stride = {}, run
        for depth, loop in enumerate(reversed(order)):
            out[loop] = stride
            stride = stride * sizes[loop] + (gap * run if depth == 1 else 0)
        return out

    a, b = strides(order_a), strides(order_b)
    return (*((sizes[i], a[i], b[i]) for i in range(len(sizes))), (run, 1, 1))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("run", [1, 2, 4, 8, 6])
def test_any_two_arrangements_any_tile_any_threads(run: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 4))
    sizes = [data.draw(st.sampled_from([1, 2, 2, 3, 4, 5])) for _ in range(count)]
    orders = [data.draw(st.permutations(range(count))) for _ in range(2)]
    dims = arranged(sizes, *orders, run, data.draw(st.integers(0, 1)))
    source, target = (
        noise(9 + sum((d[0] - 1) * d[side] for d in dims), side)[data.draw(st.integers(0, 3)) :] for side in (1, 2)
    )
    into_a, before = data.draw(st.booleans()), torch.get_num_threads()
    copy = one_row(source.data_ptr(), target.data_ptr(), dims)
    want, at = (source if into_a else target).clone(), pairs(copy)
    for x, y in zip((at[0] - source.data_ptr()).tolist(), (at[1] - target.data_ptr()).tolist(), strict=True):
        s, t = (slice(x, x + run), slice(y, y + run))
        if into_a:
            want[s] = target[t]
        else:
            want[t] = source[s]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostrows, "TILE", data.draw(st.sampled_from([1, 16, 1 << 20])))
        patch.setattr(hostrows, "_BYTES_PER_THREAD", 1)
        patch.setattr(hostrows, "_LONGEST", data.draw(st.sampled_from([1, 1 << 20])))
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
        try:
            copy_rows_on_host([copy], into_a=into_a)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(source if into_a else target, want)


@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_rows_become_pairs_as_amx_wants_its_values(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`slot head dim` → `head dim/16 slot/2 dim%16 slot%2`, every bit pattern of 2 bytes."""
    monkeypatch.setattr(hostrows, "TILE", tile)
    slots, heads, dim = 32, 32, 64
    source = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(slots, heads, dim)
    target = torch.zeros(heads, dim // 16, slots // 2, 16, 2, dtype=torch.uint16)
    row, word, page = heads * dim * 2, 64, slots * dim * 2
    dims = (
        (slots // 2, 2 * row, word),
        (2, row, 2),
        (heads, dim * 2, page),
        (dim // 16, 32, slots // 2 * word),
        (16, 2, 4),
        (2, 1, 1),
    )
    assert hostrows.pair_of(dims) == (2, row, 2)
    assert prod(size for size, _, _ in dims) == source.nbytes
    copy_rows_on_host([one_row(source.data_ptr(), target.data_ptr(), dims)], into_a=False)
    want = source.view(torch.int16).view(slots // 2, 2, heads, dim // 16, 16).permute(2, 3, 0, 4, 1)
    assert torch.equal(target.view(torch.int16), want)


def test_addresses_are_read_and_written_where_they_are() -> None:
    memory = noise(64, 0)
    view = hostrows.at(memory.data_ptr() + 3, [(2, 20), (3, 7), (5, 1)])
    assert view.shape == (2, 3)
    assert view[1, 2].tobytes() == bytes_at(memory.data_ptr() + 3 + 20 + 14, 5).tobytes()
