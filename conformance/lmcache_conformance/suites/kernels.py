"""The contract of the two copy kernels: equal to naive arithmetic, byte for byte, and no other byte changes.

    class TestMyKernels(KernelTests):
        device = "cuda"

        def take(self, source, index, out): ...
        def put(self, target, index, source, partial): ...

`take` is `out[i] = source[index[i]]`, `put` is `target[index[i]] = source[i]`, over strided views of integers, like
`lmcache_kernels.take_rows` and `put_rows`. The oracle is a loop over single bytes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_conformance.contract import Level
from lmcache_conformance.runner.marks import level
from lmcache_kernels import Digits, Rows, all_rows, put_rows, take_rows, view


@dataclass(frozen=True)
class Shape:
    """One copy between a paged and a dense side.

    Attributes:
        width: bytes per copied element.
        row: loops (size, stride in bytes) inside a row of the paged side, innermost contiguous.
        back: the same loops in the dense side.
        rows: (offset, stride) of the rows of the paged side, in bytes.
        lead: loops over the rows of the dense side.
        dense: offset in the dense side, in bytes.
    """

    width: int
    row: Digits
    back: Digits
    rows: tuple[int, int]
    lead: Digits
    dense: int

    @property
    def count(self) -> int:
        """Number of rows copied."""
        out = 1
        for size, _ in self.lead:
            out *= size
        return out


def run_of(width: int, elements: int) -> tuple[int, int]:
    """Returns a contiguous loop over so many elements."""
    return (width * elements, 1)


# Copies as in engines: a page as one run; a token of a head-first page; K of a packed page; a transposed K, element by element.
ENGINES = {
    "whole pages": Shape(16, (run_of(16, 4),), (run_of(16, 4),), (0, 64), ((3, 64),), 0),
    "token by token": Shape(8, ((2, 64), run_of(8, 2)), ((2, 16), run_of(8, 2)), (0, 16), ((8, 32),), 0),
    "K of K‖V": Shape(4, ((2, 32), run_of(4, 4)), ((2, 16), run_of(4, 4)), (0, 64), ((4, 32),), 0),
    "V of K‖V": Shape(4, ((2, 32), run_of(4, 4)), ((2, 16), run_of(4, 4)), (16, 64), ((4, 32),), 128),
    "transposed elements": Shape(2, ((8, 8), run_of(2, 1)), ((8, 2), run_of(2, 1)), (0, 2), ((4, 16),), 0),
    "fp8, odd places": Shape(1, ((3, 7), run_of(1, 5)), ((3, 5), run_of(1, 5)), (3, 23), ((5, 15),), 1),
    "layers and pages": Shape(8, (run_of(8, 4),), (run_of(8, 4),), (32, 32), ((3, 64), (2, 32)), 0),
    "one element": Shape(2, (run_of(2, 1),), (run_of(2, 1),), (0, 2), ((1, 2),), 0),
}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Draws any regular copy whose rows do not overlap."""
    width = draw(st.sampled_from([1, 2, 4, 8, 16]))
    sizes = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 2)))]
    run = draw(st.integers(1, 5)) * width

    def loops(inner: int) -> tuple[list[tuple[int, int]], int]:
        made, reach = [], inner
        for size in sizes:
            stride = reach + width * draw(st.integers(0, 2))
            made.append((size, stride))
            reach = stride * size
        return list(reversed(made)), reach

    row, row_reach = loops(run)
    back, back_reach = loops(run)
    lead, reach = [], back_reach
    for size in [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 2)))]:
        stride = reach + width * draw(st.integers(0, 1))
        lead.append((size, stride))
        reach = stride * size
    rows = (width * draw(st.integers(0, 3)), row_reach + width * draw(st.integers(0, 2)))
    return Shape(
        width, (*row, (run, 1)), (*back, (run, 1)), rows, tuple(reversed(lead)), width * draw(st.integers(0, 3))
    )


class KernelTests:
    """The contract of `take` and `put`."""

    device: str = "cpu"
    examples: int = 100
    """Number of random shapes."""

    def take(self, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """`out[i] = source[index[i]]`; `index`: int64, any shape, in range, may contain duplicates."""
        take_rows(source, index, out)

    def put(self, target: torch.Tensor, index: torch.Tensor, source: torch.Tensor, partial: bool) -> None:
        """`target[index[i]] = source[i]`; indices are distinct; with `partial`, negative ones are skipped."""
        put_rows(target, index, source, partial=partial)

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    @pytest.mark.parametrize("name", ENGINES)
    def test_engines_copies_equal_naive_arithmetic(self, name: str) -> None:
        for seed in range(4):
            self._check(ENGINES[name], seed)

    @level(Level.BYTES)
    def test_any_regular_copy_equals_naive_arithmetic(self) -> None:
        @settings(max_examples=self.examples, deadline=None)
        @given(shapes(), st.integers(0, 1000))
        def any_copy(shape: Shape, seed: int) -> None:
            self._check(shape, seed)

        any_copy()

    @level(Level.BYTES)
    def test_every_bit_pattern_of_two_bytes_survives(self) -> None:
        """All bf16 and fp16 values: NaN payloads, −0, denormals, infinities."""
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).to(self.device)
        index = torch.randperm(4096, generator=torch.Generator().manual_seed(1)).to(self.device)
        out = torch.zeros(4096, 16, dtype=torch.int16, device=self.device)
        self.take(every.view(4096, 16), index, out)
        assert torch.equal(out, every.view(4096, 16)[index])
        back = torch.zeros_like(out)
        self.put(back, index, out, False)
        assert torch.equal(back.reshape(-1), every)

    @level(Level.BYTES)
    def test_rows_far_apart_are_found(self) -> None:
        """Offsets beyond 2³¹ bytes, in memory of which only a few pages are touched."""
        if self.device != "cpu":
            pytest.skip("needs three gigabytes of address space: on the CPU only")
        stride, rows = 1 << 29, 6
        try:
            memory = torch.empty((rows - 1) * stride + 64, dtype=torch.uint8)
        except RuntimeError as error:
            pytest.skip(f"not enough address space: {error}")
        source = view(memory, Rows(0, stride, ((64, 1),)), ((rows, stride),), 8)
        for row in range(rows):
            memory[row * stride : row * stride + 64] = torch.arange(64, dtype=torch.uint8) + row
        out = torch.zeros(rows, 8, dtype=torch.int64)
        self.take(source, torch.tensor([5, 0, 4, 1, 3, 2]), out)
        assert out.view(torch.uint8)[:, 0].tolist() == [5, 0, 4, 1, 3, 2]

    @level(Level.BYTES)
    def test_nothing_is_moved_for_no_rows(self) -> None:
        source = torch.arange(64, device=self.device).view(8, 8)
        before = source.clone()
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        self.take(source, none, torch.empty(0, 8, dtype=torch.int64, device=self.device))
        self.put(source, none, torch.empty(0, 8, dtype=torch.int64, device=self.device), False)
        self.put(source, torch.full((3,), -1, device=self.device), before[:3].clone(), True)
        assert torch.equal(source, before)

    # ---------------------------------------------------------------- helpers

    def _check(self, shape: Shape, seed: int) -> None:
        rng = random.Random(seed)
        count = shape.count
        available = count + rng.randrange(3)
        paged, dense = self._memory(shape, available, rng)
        distinct = rng.sample(range(available), count)
        self._check_take(shape, paged, dense, [rng.randrange(available) for _ in range(count)])
        self._check_take(shape, paged, dense, distinct)
        self._check_put(shape, paged, dense, distinct, partial=False)
        holes = [-1 if rng.random() < 0.4 else number for number in distinct]
        self._check_put(shape, paged, dense, holes, partial=True)

    def _memory(self, shape: Shape, available: int, rng: random.Random) -> tuple[bytearray, bytearray]:
        """Returns random bytes for both sides, with a margin that must not change."""
        margin = 16
        reach = sum((size - 1) * stride for size, stride in shape.row) + 1
        paged = shape.rows[0] + (available - 1) * shape.rows[1] + reach
        span = sum((size - 1) * stride for size, stride in (*shape.lead, *shape.back)) + 1
        sizes = (-(-(paged) // 16) * 16 + margin, -(-(shape.dense + span) // 16) * 16 + margin)
        first, second = (bytearray(rng.randbytes(size)) for size in sizes)
        return first, second

    def _views(self, shape: Shape, paged: bytearray, dense: bytearray) -> tuple[torch.Tensor, ...]:
        a = torch.frombuffer(bytearray(paged), dtype=torch.uint8).to(self.device)
        b = torch.frombuffer(bytearray(dense), dtype=torch.uint8).to(self.device)
        rows = Rows(shape.rows[0], shape.rows[1], shape.row)
        width = shape.width
        # Views of wide elements need every offset and stride to be a multiple of the width; a kernel's caller ensures this.
        while width > 1 and any(n % width for n in (*shape.rows, *(s for _, s in (*shape.row[:-1], *shape.lead)))):
            width //= 2
        return a, b, all_rows(a, rows, width), view(b, Rows(shape.dense, 1, shape.back), shape.lead, width)

    def _index(self, shape: Shape, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device).view([size for size, _ in shape.lead])

    def _check_take(self, shape: Shape, paged: bytearray, dense: bytearray, numbers: Sequence[int]) -> None:
        wanted = bytearray(dense)
        for there, here in _bytes(shape, numbers):
            wanted[here] = paged[there]
        a, b, source, out = self._views(shape, paged, dense)
        self.take(source, self._index(shape, numbers), out)
        _same(b, wanted, f"take, rows {list(numbers)} of {shape}")
        _same(a, paged, f"take changed its source: {shape}")

    def _check_put(
        self, shape: Shape, paged: bytearray, dense: bytearray, numbers: Sequence[int], *, partial: bool
    ) -> None:
        wanted = bytearray(paged)
        for there, here in _bytes(shape, numbers):
            wanted[there] = dense[here]
        a, b, target, source = self._views(shape, paged, dense)
        self.put(target, self._index(shape, numbers), source, partial)
        _same(a, wanted, f"put, rows {list(numbers)} of {shape}")
        _same(b, dense, f"put changed its source: {shape}")


def _bytes(shape: Shape, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (offset on the paged side, offset on the dense side) of every copied byte."""
    leads = [range(size) for size, _ in shape.lead]
    inside = [range(size) for size, _ in shape.row]
    for number, lead in zip(numbers, itertools.product(*leads), strict=True):
        if number < 0:
            continue
        here = shape.dense + sum(i * stride for i, (_, stride) in zip(lead, shape.lead, strict=True))
        there = shape.rows[0] + number * shape.rows[1]
        for place in itertools.product(*inside):
            a = sum(i * stride for i, (_, stride) in zip(place, shape.row, strict=True))
            b = sum(i * stride for i, (_, stride) in zip(place, shape.back, strict=True))
            yield there + a, here + b


def _same(got: torch.Tensor, wanted: bytearray, case: str) -> None:
    found = bytes(got.cpu().numpy())
    if found != wanted:
        at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        raise AssertionError(f"{case}: byte {at} is {found[at]}, not {wanted[at]} as by naive arithmetic")
