"""The reference copies against plain loops, for every width and alignment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_kernels import Rows, all_rows, copy_block, put_rows, take_rows, view, width_of


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_width_is_the_widest_common_divisor_up_to_16() -> None:
    assert width_of(64, 48) == 16
    assert width_of(64, 24) == 8
    assert width_of(64, 6) == 2
    assert width_of(64, 7) == 1
    assert width_of() == 16


@settings(max_examples=100, deadline=None)
@given(
    width=st.sampled_from([1, 2, 4, 8, 16]),
    run=st.integers(1, 3),
    loops=st.integers(1, 3),
    count=st.integers(1, 5),
    start=st.integers(0, 3),
    tail=st.integers(0, 15),
    seed=st.integers(0, 99),
)
def test_take_and_put_move_the_rows_named_and_nothing_else(
    width: int, run: int, loops: int, count: int, start: int, tail: int, seed: int
) -> None:
    """Rows of `loops` runs that are separate in the pool and contiguous in the buffer."""
    n = run * width
    rows = Rows(start * width, (loops + 1) * 2 * n, ((loops, 2 * n), (n, 1)))
    back = Rows(width, 1, ((loops, n), (n, 1)))
    lead = ((count, loops * n),)
    pool = noise(rows.offset + 8 * rows.stride + tail, seed)
    buffer = noise(width + count * loops * n + tail, seed + 1)
    numbers = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:count]

    want = buffer.clone()
    for i, number in enumerate(numbers.tolist()):
        for j in range(loops):
            a, b = rows.offset + number * rows.stride + j * 2 * n, width + (i * loops + j) * n
            want[b : b + n] = pool[a : a + n]
    got = buffer.clone()
    take_rows(all_rows(pool, rows, width), numbers, view(got, back, lead, width))
    assert torch.equal(got, want)

    numbers[::2] = torch.where(torch.arange(count)[::2] % 4 == 0, numbers[::2], -1)
    want = pool.clone()
    for i, number in enumerate(numbers.tolist()):
        for j in range(loops):
            if number >= 0:
                a, b = rows.offset + number * rows.stride + j * 2 * n, width + (i * loops + j) * n
                want[a : a + n] = buffer[b : b + n]
    got = pool.clone()
    put_rows(all_rows(got, rows, width), numbers, view(buffer, back, lead, width), partial=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_an_index_of_two_dimensions_keeps_its_shape(width: int) -> None:
    n = 3 * width
    pool, rows = noise(10 * n), Rows(0, n, ((n, 1),))
    numbers = torch.tensor([[7, 2], [9, 0]])
    out = torch.zeros(2, 5 * n, dtype=torch.uint8)
    lead = ((2, 5 * n), (2, n))
    take_rows(all_rows(pool, rows, width), numbers, view(out.view(-1), Rows(n, 1, ((n, 1),)), lead, width))
    want = torch.zeros_like(out)
    want[:, n : 3 * n] = pool.view(10, n)[numbers].view(2, 2 * n)
    assert torch.equal(out, want)
    again = torch.zeros_like(pool)
    put_rows(all_rows(again, rows, width), numbers, view(out.view(-1), Rows(n, 1, ((n, 1),)), lead, width))
    assert torch.equal(again.view(10, n)[numbers], pool.view(10, n)[numbers])
    assert int((again.view(10, n) != 0).any(1).sum()) == 4


def test_overlapping_rows_let_a_row_begin_anywhere() -> None:
    """Runs of 4 tokens that start at any token: row number = token."""
    pool = noise(20 * 16)
    rows = Rows(0, 16, ((64, 1),))
    assert rows.count(pool.shape[0]) == 17
    out = torch.zeros(2 * 64, dtype=torch.uint8)
    take_rows(all_rows(pool, rows, 16), torch.tensor([3, 16]), view(out, Rows(0, 1, ((64, 1),)), ((2, 64),), 16))
    assert torch.equal(out, torch.cat([pool[48:112], pool[256:320]]))


def test_every_bit_pattern_survives_every_width() -> None:
    """NaN payloads, signalling NaNs, −0, denormals: bits are copied, not numbers."""
    patterns = torch.tensor(
        [0x7FA00001, 0xFFC12345, 0x80000000, 0x00000001, 0x7F800000, 0x7FF00000, 0xFFF80001, 0x807FFFFF]
    )
    pool = patterns.to(torch.int64).to(torch.uint32).repeat(2).view(torch.uint8).clone()
    for width in (1, 2, 4, 8, 16):
        rows = Rows(0, 16, ((16, 1),))
        out = torch.zeros(4 * 16, dtype=torch.uint8)
        take_rows(all_rows(pool, rows, width), torch.tensor([3, 2, 1, 0]), view(out, rows, ((4, 16),), width))
        assert torch.equal(out.view(4, 16), pool.view(4, 16).flip(0))
        back = torch.zeros_like(pool)
        put_rows(all_rows(back, rows, width), torch.tensor([3, 2, 1, 0]), view(out, rows, ((4, 16),), width))
        assert torch.equal(back, pool)


def test_copy_block_follows_both_sides_strides() -> None:
    src = noise(200)
    dst = torch.zeros(200, dtype=torch.uint8)
    copy_block(src, 4, dst, 8, ((3, 32, 8), (2, 4, 100), (4, 1, 1)), 4)
    want = torch.zeros(200, dtype=torch.uint8)
    for i in range(3):
        for j in range(2):
            a, b = 4 + 32 * i + 4 * j, 8 + 8 * i + 100 * j
            want[b : b + 4] = src[a : a + 4]
    assert torch.equal(dst, want)
