"""Rows copied by the Triton kernel, interpreted on the CPU, equal naive index arithmetic, and no other byte changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from pagelab import PAGES, Lab

from lmcache_kernels import CopyError, Dim, launch
from lmcache_kernels.launch import specialise
from lmcache_kernels.rowcopy import RowCopy

CPU = torch.device("cpu")
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


copy_rows = interpreted("triton_copy").copy_rows


def check(lab: Lab, into_a: bool) -> None:
    wanted_a, wanted_b = lab.wanted(into_a)
    copy_rows(lab.copy, into_a=into_a, device=CPU)
    assert torch.equal(lab.a, wanted_a)
    assert torch.equal(lab.b, wanted_b)


def one_row(a: torch.Tensor, b: torch.Tensor, dims: tuple[Dim, ...]) -> RowCopy:
    """A copy of one row between the starts of two tensors."""
    zero = np.zeros(1, dtype=np.int64)
    return RowCopy(zero + a.data_ptr(), zero.reshape(1, 1), zero + b.data_ptr(), zero, zero, dims)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("into_a", [False, True], ids=["gather", "scatter"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "block"), [(n, s) for n in PAGES for s in (1, 16, 32, 128) if s % PAGES[n].slots == 0]
)
def test_a_page_and_its_canonical_order_are_the_same_elements(name: str, width: int, block: int, into_a: bool) -> None:
    page, heads, dim = PAGES[name], 2, 32 if block < 128 else 16
    shape = (block, heads, dim)
    nbytes, row = page.nbytes(*shape, width), block * heads * dim * width
    small = block < 128
    lab = Lab(page.dims(*shape, width), nbytes, row, units=3 if small else 1, skip=int(small), layers=2, seed=block)
    if row <= 4096:
        check(lab, into_a)
    else:
        copy_rows(lab.copy, into_a=into_a, device=CPU)
    for layer, o, u in itertools.product(range(lab.copy.layers), range(lab.copy.objects), range(lab.copy.units)):
        if lab.copy.a_units[o, u] >= 0:
            x = int(lab.copy.a_base[layer] + lab.copy.a_units[o, u]) - lab.a.data_ptr()
            y = int(lab.copy.b_base[o] + lab.copy.b_layers[layer] + lab.copy.b_units[u]) - lab.b.data_ptr()
            there = page.read(lab.a[x : x + nbytes].view(INTS[width]), *shape)
            assert torch.equal(there, lab.b[y : y + row].view(INTS[width]).view(shape))


@pytest.mark.parametrize("into_a", [False, True], ids=["gather", "scatter"])
@pytest.mark.parametrize("name", ["HND", "K transposed"])
def test_every_bit_pattern_of_two_bytes_survives(name: str, into_a: bool) -> None:
    """Every bit pattern of bf16 and fp16: NaN payloads, −0, denormals, infinities."""
    shape = (16, 32, 128)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        full, empty = every.clone().view(dtype), torch.zeros(65536, dtype=dtype)
        a, b = (empty, full) if into_a else (full, empty)
        copy_rows(one_row(a, b, PAGES[name].dims(*shape, 2)), into_a=into_a, device=CPU)
        assert torch.equal(PAGES[name].read(a.view(torch.int16), *shape).reshape(-1), b.view(torch.int16))
        assert torch.equal((a if into_a else b).view(torch.int16).sort().values, every.sort().values)


def test_fp32_and_fp8_bits_survive() -> None:
    for dtype, width in ((torch.float32, 4), (torch.float8_e4m3fn, 1), (torch.int8, 1)):
        shape, page = (16, 1, 64), PAGES["K transposed"]
        bits = torch.randint(0, 256, (1024 * width,), dtype=torch.uint8)
        bits[:4] = torch.tensor([1, 0, 0xA0, 0xFF])  # a signalling NaN with a payload
        a, b = bits.view(dtype), torch.zeros(1024, dtype=dtype)
        copy_rows(one_row(a, b, page.dims(*shape, width)), into_a=False, device=CPU)
        assert torch.equal(page.read(a.view(INTS[width]), *shape).reshape(-1), b.view(INTS[width]))


# ---------------------------------------------------------------- edges

RAGGED: dict[str, tuple[Dim, ...]] = {
    "a run of 33 16-byte words": ((528, 1, 1),),
    "a run of 1040 words, one chunk and a bit": ((16640, 1, 1),),
    "runs of 250 bytes": ((3, 256, 250), (250, 1, 1)),
    "7 slots × 5 elements, transposed": ((7, 2, 10), (5, 14, 2), (2, 1, 1)),
    "80 elements × 3 slots, transposed": ((3, 4, 320), (80, 12, 4), (4, 1, 1)),
    "5 slots × 48 elements, transposed, gaps": ((5, 8, 400), (48, 48, 8), (8, 1, 1)),
    "one byte": ((1, 1, 1),),
    "loops of one position": ((1, 64, 32), (1, 9, 9), (32, 1, 1)),
    "three loops crossed": ((3, 2, 24), (4, 18, 6), (3, 6, 2), (2, 1, 1)),
}


@pytest.mark.parametrize("into_a", [False, True], ids=["gather", "scatter"])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_ends_and_guards(name: str, into_a: bool) -> None:
    dims = RAGGED[name]
    a_page, b_row = (1 + sum((d[0] - 1) * d[side] for d in dims) for side in (1, 2))
    for shift in (0, 1) if a_page < 4096 else (0,):
        check(Lab(dims, a_page + 3 if shift else -(-a_page // 16) * 16, -(-b_row // 16) * 16, shift=shift), into_a)


def test_units_and_layers_of_any_number_and_few_programs() -> None:
    dims: tuple[Dim, ...] = ((4, 64, 32), (32, 1, 1))
    for layers, objects, units in ((1, 1, 1), (3, 1, 5), (1, 7, 1), (5, 3, 2)):
        lab = Lab(dims, 256, 128, layers=layers, objects=objects, units=units, skip=0)
        wanted = lab.wanted(False)[1]
        copy_rows(lab.copy, into_a=False, device=CPU, max_programs=1)
        assert torch.equal(lab.b, wanted)


def test_nothing_moves_for_no_rows() -> None:
    lab = Lab(((64, 1, 1),), 64, 64, skip=99)
    check(lab, False)
    empty = replace(
        lab.copy,
        a_units=np.empty((0, 3), dtype=np.int64),
        b_base=np.empty(0, dtype=np.int64),
    )
    copy_rows(empty, into_a=True, device=CPU)
    none = replace(lab.copy, a_base=np.empty(0, dtype=np.int64), b_layers=np.empty(0, dtype=np.int64))
    copy_rows(none, into_a=True, device=CPU)


def test_a_source_may_be_read_twice() -> None:
    lab = Lab(((64, 1, 1),), 64, 64, skip=0)
    shared = replace(lab.copy, a_units=np.zeros_like(lab.copy.a_units))
    lab.copy = shared
    check(lab, False)
    with pytest.raises(CopyError):
        copy_rows(shared, into_a=True, device=CPU)


# ---------------------------------------------------------------- large offsets


@pytest.mark.parametrize(
    "dims",
    [
        ((64, 1, 1),),
        ((2, 1 << 31, 64), (64, 1, 1)),
        ((2, (1 << 31) + 1, 64), (64, 1, 1)),  # in elements of one byte, beyond int32
        ((3, 1 << 30, 2048), (2048, 1, 1)),  # a loop around tiles; the previous case is a loop within one
        ((8, 2, 16), (8, (1 << 28) + 16, 2), (2, 1, 1)),
    ],
)
@pytest.mark.parametrize("into_a", [False, True], ids=["gather", "scatter"])
def test_offsets_beyond_two_gib(dims: tuple[Dim, ...], into_a: bool) -> None:
    """Memory of which only a few pages are touched."""
    try:
        far = torch.empty(5 << 30, dtype=torch.uint8)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    near = torch.randint(0, 256, (3 * 8192,), dtype=torch.uint8)
    units = np.array([[(2 << 30) + 4096, 64, (1 << 31) - 2048]], dtype=np.int64)
    zero = np.zeros(1, dtype=np.int64)
    copy = RowCopy(
        zero + far.data_ptr(), units, zero + near.data_ptr(), zero, np.arange(3, dtype=np.int64) * 8192, dims
    )
    pairs = [
        (
            int(u) + sum(i * d[1] for i, d in zip(at, dims, strict=True)),
            row * 8192 + sum(i * d[2] for i, d in zip(at, dims, strict=True)),
        )
        for row, u in enumerate(units[0])
        for at in itertools.product(*(range(d[0]) for d in dims))
    ]
    x, y = (torch.tensor(side) for side in zip(*pairs, strict=True))
    assert int(x.max()) > 1 << 31
    value = torch.randint(0, 256, (len(pairs),), dtype=torch.uint8)
    if into_a:
        near[y] = value
    else:
        far[x] = value
    copy_rows(copy, into_a=into_a, device=CPU)
    assert torch.equal(far[x], value)
    assert torch.equal(near[y], value)


def test_copies_of_more_pieces_than_an_int32_counts_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(((64, 1, 1),), 64, 64, units=200)
    each = specialise(lab.copy).items(lab.copy.layers * lab.copy.units)
    monkeypatch.setattr(launch, "MOST", each)
    split = launch.parts(lab.copy)
    assert [part.objects for part in split] == [1, 1]
    assert np.concatenate([part.a_units for part in split]).tolist() == lab.copy.a_units.tolist()
    monkeypatch.setattr(launch, "MOST", each - 1)
    with pytest.raises(CopyError, match="pieces"):
        launch.parts(lab.copy)


# ---------------------------------------------------------------- any shape


@st.composite
def loops(draw: st.DrawFn) -> tuple[tuple[Dim, ...], int, int]:
    """Draws loops nested in any order on each side, with gaps, and the bytes of a row on A and B."""
    width = draw(st.sampled_from([1, 2, 4, 8, 16]))
    run = width * draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 9), max_size=3))

    def strides() -> tuple[list[int], int]:
        out, reach = [0] * len(sizes), run
        for i in draw(st.permutations(range(len(sizes)))):
            out[i] = reach
            reach = reach * sizes[i] + width * draw(st.integers(0, 1)) * draw(st.integers(0, 3))
        return out, reach

    (a, a_row), (b, b_row) = strides(), strides()
    return (*zip(sizes, a, b, strict=True), (run, 1, 1)), a_row, b_row


@settings(max_examples=40, deadline=None)
@given(loops(), st.booleans(), st.integers(0, 3), st.integers(0, 1000))
def test_any_copy_equals_naive_arithmetic(
    shape: tuple[tuple[Dim, ...], int, int], into_a: bool, skip: int, seed: int
) -> None:
    dims, a_row, b_row = shape
    check(Lab(dims, a_row, b_row, objects=1, units=4, layers=1, skip=skip, seed=seed), into_a)


# ---------------------------------------------------------------- choice of kernel


def test_elements_are_as_wide_as_every_address_allows() -> None:
    page = ((2, 4096, 2048), (2048, 1, 1))
    lab = Lab(page, 8192, 4096)
    chosen = specialise(lab.copy)
    assert (chosen.width, chosen.align) == (8, 16)
    for off, width in ((8, 8), (4, 4), (2, 2), (1, 1)):
        chosen = specialise(replace(lab.copy, a_base=lab.copy.a_base + off))
        assert (chosen.width, chosen.align) == (width, off)


def test_the_choice_does_not_depend_on_how_much_is_copied() -> None:
    dims = PAGES["K transposed"].dims(16, 8, 128, 2)
    few, many = (Lab(dims, 32768, 32768, objects=n, units=n, layers=n).copy for n in (1, 5))
    assert specialise(few) == specialise(many)
