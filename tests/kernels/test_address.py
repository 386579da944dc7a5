"""Address arithmetic, and runs that are contiguous on both sides."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_kernels import Digits, Dim, PlaneAddress, Strip, coalesce, merge_strips, refine, table


def offsets(digits: Digits) -> list[int]:
    indices = product(*(range(size) for size, _ in digits))
    return [sum(i * stride for i, (_, stride) in zip(index, digits, strict=True)) for index in indices]


def pairs(dims: tuple[Dim, ...], a: int = 0, b: int = 0) -> list[tuple[int, int]]:
    indices = product(*(range(size) for size, _, _ in dims))
    return sorted(
        (
            a + sum(i * d[1] for i, d in zip(index, dims, strict=True)),
            b + sum(i * d[2] for i, d in zip(index, dims, strict=True)),
        )
        for index in indices
    )


digit_lists = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50)), max_size=4).map(tuple)


@given(digit_lists)
def test_a_table_lists_the_offset_of_every_position(digits: Digits) -> None:
    assert table(digits).tolist() == offsets(digits)


@st.composite
def same_extent(draw: st.DrawFn) -> tuple[Digits, Digits]:
    """Draws one axis in two arrangements, whose radixes need not divide each other."""
    extent = draw(st.sampled_from([1, 2, 6, 12, 24, 30, 48, 60]))

    def split() -> Digits:
        left, digits = extent, []
        while left > 1:
            size = draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
            digits.append((size, draw(st.integers(1, 500))))
            left //= size
        return tuple(digits)

    return split(), split()


@settings(max_examples=300, deadline=None)
@given(same_extent())
def test_refinement_covers_every_position_once_on_both_sides(both: tuple[Digits, Digits]) -> None:
    a, b = both
    pieces = refine(a, b)
    found = [pair for piece in pieces for pair in pairs(piece.dims, piece.a, piece.b)]
    assert all(
        dim[1] > 0 and dim[2] > 0 for piece in pieces for dim in piece.dims
    )  # views cannot have negative strides
    assert sorted(found) == sorted(zip(table(a).tolist(), table(b).tolist(), strict=True))


def test_radixes_that_divide_each_other_refine_to_one_piece() -> None:
    (piece,) = refine(((8, 64), (32, 2)), ((256, 4),))
    assert piece.dims == ((8, 64, 128), (32, 2, 4))
    assert len(refine(((20, 1), (12, 20)), ((15, 1), (16, 15)))) > 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 40), st.integers(0, 40)), max_size=5).map(tuple))
def test_coalescing_keeps_the_set_of_copies(dims: tuple[Dim, ...]) -> None:
    few = coalesce(dims)
    assert len(few) <= len(dims)
    assert pairs(few) == pairs(dims)


def test_a_packed_page_coalesces_to_one_run_of_k_and_v() -> None:
    """head slot (kv dim) of 3 heads, 4 slots, 8 elements of 2 bytes, dense on both sides."""
    inner = ((3, 4 * 32, 4 * 32), (4, 32, 32), (8, 2, 2), (2, 1, 1))
    k, v = (Strip(((0, start),), start, 1000, ((5, 500),), inner) for start in (0, 16))
    (page,) = merge_strips([v, k])
    assert page.dims == ((3 * 4 * 32, 1, 1),)
    assert (page.sources, page.offset) == (((0, 0),), 0)


def test_strips_do_not_merge_across_a_gap_a_storage_or_a_tag() -> None:
    dims = ((16, 1, 1),)
    first = Strip(((0, 0),), 0, 1000, ((5, 500),), dims)
    for other in (
        Strip(((0, 17),), 16, 1000, ((5, 500),), dims),
        Strip(((1, 16),), 16, 1000, ((5, 500),), dims),
        Strip(((0, 16),), 17, 1000, ((5, 500),), dims),
        Strip(((0, 16),), 16, 999, ((5, 500),), dims),
        Strip(((0, 16),), 16, 1000, ((5, 501),), dims),
        Strip(((0, 16),), 16, 1000, ((5, 500),), dims, tag=1),
        Strip(((0, 16),), 16, 1000, ((5, 500),), dims, first=1),
        Strip(((0, 16), (0, 99)), 16, 1000, ((5, 500),), dims),
    ):
        assert len(merge_strips([first, other])) == 2
    two_layers = Strip(((0, 0), (0, 200)), 0, 1000, ((5, 500),), dims)
    assert len(merge_strips([two_layers, replace(two_layers, sources=((0, 16), (0, 217)), offset=16)])) == 2
    assert len(merge_strips([two_layers, replace(two_layers, sources=((0, 16), (0, 216)), offset=16)])) == 1
    assert len(merge_strips([first, Strip(((0, 16),), 16, 1000, ((5, 500),), dims)])) == 1


def test_addresses_beyond_2_31_bytes_are_exact() -> None:
    """A pool of 70B-sized pages: 80 layers × 100,000 pages × 512 KiB."""
    page = 80 * (512 << 10)
    address = PlaneAddress(0, 79 * (512 << 10) + 256, page, 4096, ((16, 32768),), ((128, 2),), 2)
    assert address.at(99_999, 7, 15, 127) == 99_999 * page + 79 * 524288 + 256 + 7 * 4096 + 15 * 32768 + 254
    assert address.at(99_999, 7, 15, 127) > 1 << 41
    assert address.T.dtype == address.E.dtype == np.int64
