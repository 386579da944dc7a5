"""Copies between two arrangements against plain loops: pairs joined, tiles cut, threads, guard bytes."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache_kernels.tiles as tiles
from lmcache_kernels import Block, Dim, copy_blocks


def noise(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def arranged(sizes: list[int], order_a: list[int], order_b: list[int], run: int, gap: int) -> tuple[Dim, ...]:
    """Loops that are dense in two orders, but for a gap of `gap` runs behind the innermost loop but one on each side."""

    def strides(order: list[int]) -> dict[int, int]:
        out, stride = {}, run
        for depth, loop in enumerate(reversed(order)):
            out[loop] = stride
            stride = stride * sizes[loop] + (gap * run if depth == 1 else 0)
        return out

    a, b = strides(order_a), strides(order_b)
    return (*((sizes[i], a[i], b[i]) for i in range(len(sizes))), (run, 1, 1))


def naive(source: torch.Tensor, target: torch.Tensor, block: Block) -> torch.Tensor:
    want = target.clone()
    run = block.dims[-1][0]
    for place in product(*(range(n) for n, _, _ in block.dims[:-1])):
        a = block.a + sum(i * s for i, (_, s, _) in zip(place, block.dims, strict=False))
        b = block.b + sum(i * t for i, (_, _, t) in zip(place, block.dims, strict=False))
        want[b : b + run] = source[a : a + run]
    return want


def extent(block: Block, side: int) -> int:
    return 1 + sum((d[0] - 1) * d[side] for d in block.dims)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("run", [1, 2, 4, 8, 6])
def test_any_two_arrangements_any_tile_any_threads(run: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.sampled_from([1, 2, 2, 3, 4, 5])) for _ in range(count)]
    orders = [data.draw(st.permutations(range(count))) for _ in range(2)]
    dims = arranged(sizes, *orders, run, data.draw(st.integers(0, 1)))
    start, shift = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3))
    block = Block(start, 2 * shift, dims)
    source = noise(extent(block, 1) + start + 7, 1)[data.draw(st.integers(0, 1)) :]
    target = noise(extent(block, 2) + 2 * shift + 9, 2)[data.draw(st.integers(0, 2)) :]
    want, threads = naive(source, target, block), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", data.draw(st.sampled_from([1, 16, 1 << 20])))
        patch.setattr(tiles, "_WORTH_A_THREAD", 1)
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
        try:
            copy_blocks(source, target, [block])
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(target, want)


@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_rows_become_pairs_as_amx_wants_its_values(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`slot head dim` → `head dim/16 slot/2 dim%16 slot%2`, every bit pattern of 2 bytes."""
    monkeypatch.setattr(tiles, "TILE", tile)
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
    assert tiles.pair_of(dims) == (2, row, 2)
    copy_blocks(source.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8), [Block(0, 0, dims)])
    want = source.view(torch.int16).view(slots // 2, 2, heads, dim // 16, 16).permute(2, 3, 0, 4, 1)
    assert torch.equal(target.view(torch.int16), want)


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), limit=st.integers(1, 200))
def test_parts_cover_a_block_once(sizes: list[int], limit: int) -> None:
    order = list(range(len(sizes)))
    block = Block(3, 5, arranged(sizes, order, order[::-1], 2, 0))
    parts = tiles.cut(block, limit)
    assert sum(part.nbytes for part in parts) == block.nbytes == 2 * prod(sizes)
    assert all(part.nbytes <= max(limit, 2) for part in parts)
    source, target = noise(extent(block, 1) + 3, 1), noise(extent(block, 2) + 5, 2)
    want = naive(source, target, block)
    for part in parts:
        target = naive(source, target, part)
    assert torch.equal(target, want)
