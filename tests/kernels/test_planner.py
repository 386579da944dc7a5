"""The planner's output equals the original copy, byte pair by byte pair."""

from __future__ import annotations

from time import thread_time

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from rowlab import byte_pairs, copies, pairs_of

from lmcache_kernels import RowCopy, plan, some_objects
from lmcache_kernels.planner import DMA_BYTES, ranges, union


def rows(a_base: object, a_units: object, b_base: object, b_layers: object, b_units: object, *dims: object) -> RowCopy:
    arrays = (np.array(x, dtype=np.int64) for x in (a_base, a_units, b_base, b_layers, b_units))
    return RowCopy(*arrays, tuple(dims))  # type: ignore[arg-type]


def thresholds(copy: RowCopy) -> st.SearchStrategy[int]:
    """Thresholds at which this copy is split differently."""
    return st.sampled_from(sorted({n + more for _, _, n in runs(pairs_of(copy)) for more in (0, 1)}) or [1])


@settings(max_examples=400, deadline=None)
@given(copy=copies(), data=st.data(), shuffle=st.sampled_from([1, 1, 3, 64]))
def test_a_plan_moves_exactly_the_pairs_of_its_copy(copy: RowCopy, data: st.DataObject, shuffle: int) -> None:
    dma = data.draw(thresholds(copy))
    plan_ = plan(copy, dma_bytes=dma, shuffle_bytes=shuffle)
    got = byte_pairs(plan_.a, plan_.b, plan_.nbytes) + [pair for rest in plan_.kernel for pair in pairs_of(rest)]
    assert sorted(got) == pairs_of(copy)
    assert (plan_.nbytes >= dma).all()
    assert plan_.dma_total + sum(rest.nbytes for rest in plan_.kernel) == copy.nbytes
    event("mixed" if len(plan_.nbytes) and plan_.kernel else "dma" if len(plan_.nbytes) else "kernel")
    event(f"{len(plan_.kernel)} kernels")


@settings(max_examples=300, deadline=None)
@given(copy=copies(), data=st.data())
def test_runs_are_maximal_and_none_that_is_long_enough_stays_with_the_kernel(
    copy: RowCopy, data: st.DataObject
) -> None:
    dma = data.draw(thresholds(copy))
    plan_ = plan(copy, dma_bytes=dma, shuffle_bytes=1)
    want = runs(pairs_of(copy))
    got = sorted(zip(plan_.a.tolist(), plan_.b.tolist(), plan_.nbytes.tolist(), strict=True))
    assert got == sorted(run for run in want if run[2] >= dma)


def runs(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Maximal runs, found byte by byte."""
    there, out = set(pairs), []
    for a, b in pairs:
        if (a - 1, b - 1) in there:
            continue
        n = 1
        while (a + n, b + n) in there:
            n += 1
        out.append((a, b, n))
    return out


@given(copy=copies())
@settings(max_examples=100, deadline=None)
def test_inside_one_device_the_kernel_moves_everything(copy: RowCopy) -> None:
    plan_ = plan(copy, link=False, dma_bytes=1)
    assert not len(plan_.a)
    assert plan_.kernel == ((copy,) if copy.nbytes else ())


def test_neighbouring_pages_become_one_descriptor_and_a_lonely_page_stays() -> None:
    page = 8 << 10
    copy = rows([1 << 20], [[0, page, 2 * page, 3 * page, 9 * page]], [1 << 30], [0], np.arange(5) * page, (page, 1, 1))
    plan_ = plan(copy)
    assert plan_.nbytes.tolist() == [4 * page]
    assert (plan_.a.tolist(), plan_.b.tolist()) == ([1 << 20], [1 << 30])
    [rest] = plan_.kernel
    assert (rest.a_units.tolist(), rest.b_units.tolist()) == ([[9 * page]], [4 * page])


def test_layers_that_continue_on_both_sides_are_one_run() -> None:
    row = 1 << 10
    layers = np.arange(32) * row
    plan_ = plan(rows(layers, [[0]], [1 << 30], layers, [0], (row, 1, 1)))
    assert plan_.nbytes.tolist() == [32 * row]
    assert not plan_.kernel


def test_layers_of_which_only_some_continue_leave_the_others_to_a_kernel() -> None:
    row = 1 << 14
    copy = rows([0, row, 1 << 20], [[0, 1 << 18]], [1 << 30], [0, row, 2 * row], [0, 1 << 19], (row, 1, 1))
    plan_ = plan(copy)
    assert plan_.nbytes.tolist() == [2 * row, 2 * row]
    [rest] = plan_.kernel
    assert (rest.a_base.tolist(), rest.b_layers.tolist()) == ([1 << 20], [2 * row])
    assert rest.nbytes == 2 * row


def test_layers_that_keep_different_rows_are_different_kernels() -> None:
    row = 1 << 14  # layer 1 starts at the end of unit 1 of layer 0 and ends at the start of unit 0 of layer 2
    copy = rows(
        [0, 2 * row, 5 * row], [[0, row, 4 * row]], [1 << 30], [0, 2 * row, 5 * row], [0, row, 4 * row], (row, 1, 1)
    )
    plan_ = plan(copy, dma_bytes=8 * row)
    assert len(plan_.kernel) == 1
    got = byte_pairs(plan_.a // 64, plan_.b // 64, plan_.nbytes // 64)
    assert len(got) + sum(rest.nbytes for rest in plan_.kernel) // 64 == copy.nbytes // 64


def test_a_change_of_layout_stays_with_the_kernel_whole() -> None:
    copy = rows([0], [[0, 1 << 16]], [1 << 30], [0], [0, 1 << 16], (256, 256, 4096), (8, 8192, 256), (256, 1, 1))
    assert plan(copy).kernel == (copy,)
    long = rows([0], [[0]], [1 << 30], [0], [0], (2, 1 << 20, 1 << 16), (1 << 15, 1, 1))
    assert plan(long).nbytes.tolist() == [1 << 15, 1 << 15]


def test_loops_that_are_contiguous_after_all_are_no_change_of_layout() -> None:
    copy = rows([0], [[0]], [1 << 30], [0], [0], (256, 256, 256), (256, 1, 1))
    assert plan(copy).nbytes.tolist() == [1 << 16]


def test_the_threshold_is_inclusive() -> None:
    copy = rows([0], [[0]], [1 << 30], [0], [0], (DMA_BYTES, 1, 1))
    assert not plan(copy).kernel
    assert plan(copy, dma_bytes=DMA_BYTES + 1).kernel == (copy,)


def test_nothing_resident_is_nothing_to_do() -> None:
    copy = rows([0], [[-1, -1]], [1 << 30], [0], [0, 8], (8, 1, 1))
    for link in (True, False):
        plan_ = plan(copy, link=link)
        assert not len(plan_.a)
        assert not plan_.kernel


def test_thousands_of_rows_take_milliseconds() -> None:
    """100 objects × 16 pages × 64 layers: 102 400 rows. A Python loop over rows would take a tenth of a second or more."""
    rng = np.random.default_rng(0)
    page = 4096
    units = rng.permutation(1 << 12)[:1600].reshape(100, 16).astype(np.int64) * page
    copy = RowCopy(
        np.arange(64, dtype=np.int64) << 32,
        units,
        (1 << 45) + np.arange(100, dtype=np.int64) * (64 * 16 * page),
        np.arange(64, dtype=np.int64) * 16 * page,
        np.arange(16, dtype=np.int64) * page,
        ((page, 1, 1),),
    )
    best = min(timed(copy) for _ in range(5))
    assert best < 0.05, f"{best * 1e3:.1f} ms"


def timed(copy: RowCopy) -> float:
    # CPU time of this thread only, independent of other processes.
    start = thread_time()
    plan(copy)
    return thread_time() - start


@settings(max_examples=200, deadline=None)
@given(copy=copies())
def test_ranges_are_the_bytes_touched(copy: RowCopy) -> None:
    for side in (0, 1):
        starts, lengths = ranges(copy, "ab"[side])
        got = [int(s) + i for s, n in zip(starts, lengths, strict=True) for i in range(int(n))]
        assert got == sorted({pair[side] for pair in pairs_of(copy)})
        assert (starts[1:] > (starts + lengths)[:-1]).all()


def test_the_union_of_nested_and_touching_ranges() -> None:
    starts, lengths = union(np.array([10, 0, 2, 20, 12]), np.array([2, 8, 2, 5, 3]))
    assert (starts.tolist(), lengths.tolist()) == ([0, 10, 20], [8, 5, 5])


@given(copy=copies(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_parts_of_a_copy_are_together_the_copy(copy: RowCopy, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, copy.objects))
    parts = [some_objects(copy, slice(0, cut)), some_objects(copy, slice(cut, None))]
    assert sorted(p for part in parts if part.objects for p in pairs_of(part)) == pairs_of(copy)


def test_a_copy_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="same layers"):
        rows([0, 1], [[0]], [0], [0], [0], (8, 1, 1))
