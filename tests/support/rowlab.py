"""Row copies on host memory: a kernel made of numpy, and random copies for properties."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from hypothesis import strategies as st

from lmcache_kernels.rowcopy import Ints, RowCopy


def bytes_at(address: int, nbytes: int) -> np.ndarray:
    """A view of raw host memory."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=np.uint8)


def copy_rows(
    copy: RowCopy,
    *,
    into_a: bool,
    device: torch.device | None = None,
    stream: object = None,
    max_programs: int | None = None,
    trusted: bool = False,
) -> None:
    """A row kernel for host addresses: read everything, then write everything."""
    a, b, n = pairs(copy)
    src, dst = (b, a) if into_a else (a, b)
    held = [bytes_at(s, n).copy() for s in src.tolist()]
    for d, data in zip(dst.tolist(), held, strict=True):
        bytes_at(d, n)[:] = data


def pairs(copy: RowCopy) -> tuple[Ints, Ints, int]:
    """(addresses on A, addresses on B, bytes) of every contiguous run."""
    rows_a, rows_b = copy.rows()
    inside = list(copy.inside())
    a = np.concatenate([rows_a + off for off, _, _ in inside])
    b = np.concatenate([rows_b + off for _, off, _ in inside])
    return a, b, copy.run


def byte_pairs(a: Ints, b: Ints, nbytes: Ints) -> list[tuple[int, int]]:
    """Every (byte on A, byte on B), sorted; a pair that occurs twice is there twice."""
    return sorted((int(x) + i, int(y) + i) for x, y, n in zip(a, b, nbytes, strict=True) for i in range(int(n)))


def pairs_of(copy: RowCopy) -> list[tuple[int, int]]:
    a, b, n = pairs(copy)
    return byte_pairs(a, b, np.full(len(a), n))


@st.composite
def copies(draw: st.DrawFn) -> RowCopy:
    """Copies whose rows often continue each other: across units, layers, objects and the loops inside a row."""
    inner = draw(st.integers(1, 6))
    outer = draw(st.integers(1, 3))
    gap_a, gap_b = draw(st.sampled_from([0, 0, 2])), draw(st.sampled_from([0, 0, 3]))
    objects, layers, units = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 3, 2, 4])),
        draw(st.sampled_from([1, 4, 5, 3])),
    )
    row = outer * inner
    # Side A: pages of all layers side by side, or of one layer apart; inside a row, runs together or by plane.
    count = objects * units + draw(st.integers(0, 2))
    numbers = list(range(count))
    if draw(st.booleans()):
        i, j = draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1))
        numbers[i:] = reversed(numbers[i:])
        numbers[i], numbers[j] = numbers[j], numbers[i]
    plane_a, plane_b = draw(st.booleans()), draw(st.booleans())
    if plane_a:
        step_a, page, layer_a = count * inner + gap_a, inner, outer * (count * inner + gap_a)
    else:
        step_a, page = inner + draw(st.sampled_from([0, 1])), 0
        page = outer * step_a + gap_a
        layer_a = count * page
        if draw(st.booleans()):
            page, layer_a = layers * page, page
    if plane_b:
        step_b, unit_b, layer_b = units * inner + gap_b, inner, outer * (units * inner + gap_b)
    else:
        step_b, unit_b = inner, row + gap_b
        layer_b = units * unit_b
        if draw(st.booleans()):
            unit_b, layer_b = layers * unit_b, unit_b
    object_b = layers * max(layer_b, 1) * max(1, units) + draw(st.sampled_from([0, 5]))
    if layer_b >= unit_b:
        object_b = layers * layer_b + draw(st.sampled_from([0, 5]))
    a_units = np.array(numbers[: objects * units], dtype=np.int64).reshape(objects, units) * page
    skip = draw(st.lists(st.integers(0, objects * units - 1), max_size=3))
    a_units.reshape(-1)[skip] = -1
    order = np.array(draw(st.permutations(range(layers))), dtype=np.int64)
    far = np.array(draw(st.lists(st.sampled_from([0, 0, 9000]), min_size=layers, max_size=layers)), dtype=np.int64)
    return RowCopy(
        1000 + order * layer_a + np.cumsum(far),
        a_units,
        90000 + np.arange(objects, dtype=np.int64) * object_b,
        order * layer_b,
        np.arange(units, dtype=np.int64) * unit_b,
        ((outer, step_a, step_b), (inner, 1, 1)),
    )
