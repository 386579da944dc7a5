"""Rows between an engine's pages and objects, on a GPU: one kernel family, driven by addresses alone.

Bits move as integers as wide as alignment allows. `run` moves rows whose innermost loop is contiguous on both sides; `turn`
reads a tile in the order of one side and writes it in the order of the other, so that both accesses are wide, and lets the
compiler turn it in shared memory. Programs walk over the pieces of all layers, objects and pages of one launch, so that their
number can be held down to what the forward pass can spare.
"""

from __future__ import annotations

from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl

from lmcache_kernels.checks import check_copy
from lmcache_kernels.launch import Launch, Specialisation, launch_of, parts
from lmcache_kernels.rowcopy import RowCopy

_ELEMENTS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

_PROGRAMS = 1 << 14

_first_launch = Lock()

COUNTS = ("layers", "objects", "units")
"""Arguments that are data: what is launched is what was compiled ahead of time, however many there are."""


@triton.jit
def _row(tables, layers, objects, units, row, there):  # type: ignore[no-untyped-def]
    """Addresses of rows on both sides, and which of those that are `there` are resident."""
    unit = row % units
    rest = row // units
    layer = rest % layers
    thing = rest // layers
    b_layers = tables + layers
    b_base = b_layers + layers
    b_units = b_base + objects
    a_units = b_units + units
    offset = tl.load(a_units + thing.to(tl.int64) * units + unit, mask=there, other=-1)
    there = there & (offset >= 0)
    a = tl.load(tables + layer, mask=there, other=0) + offset
    b = tl.load(b_base + thing, mask=there, other=0) + tl.load(b_layers + layer, mask=there, other=0)
    return a, b + tl.load(b_units + unit, mask=there, other=0), there


@triton.jit
def _inside(place, SIZES: tl.constexpr, STRIDES: tl.constexpr, FAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of positions in nested loops."""
    rest = place.to(tl.int64) if FAR else place
    offset = rest * 0
    for i in tl.static_range(len(SIZES)):
        if i == len(SIZES) - 1:
            offset += rest * STRIDES[0]
        else:
            offset += (rest % SIZES[len(SIZES) - 1 - i]) * STRIDES[len(SIZES) - 1 - i]
            rest = rest // SIZES[len(SIZES) - 1 - i]
    return offset


@triton.jit(do_not_specialize=COUNTS)
def run(  # type: ignore[no-untyped-def]
    tables,
    layers,
    objects,
    units,
    INTO_A: tl.constexpr,
    FAR: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    SIZES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`ROWS` rows of `COUNT` elements at a time, `TILE` of each."""
    tiles: tl.constexpr = (COUNT + TILE - 1) // TILE
    rows = layers * objects * units
    for item in range(tl.program_id(0), (rows + ROWS - 1) // ROWS * tiles, tl.num_programs(0)):
        row = (item // tiles) * ROWS + tl.arange(0, ROWS)
        a, b, there = _row(tables, layers, objects, units, row, row < rows)
        place = (item % tiles) * TILE + tl.arange(0, TILE)
        from_a = (
            tl.multiple_of(a.to(tl.pointer_type(ELEMENT))[:, None], (ALIGN, ALIGN))
            + _inside(place, SIZES, A, FAR)[None, :]
        )
        from_b = (
            tl.multiple_of(b.to(tl.pointer_type(ELEMENT))[:, None], (ALIGN, ALIGN))
            + _inside(place, SIZES, B, FAR)[None, :]
        )
        mask = there[:, None] & (place < COUNT)[None, :]
        if INTO_A:
            tl.store(from_a, tl.load(from_b, mask=mask, cache_modifier=".cg"), mask=mask)
        else:
            tl.store(from_b, tl.load(from_a, mask=mask, cache_modifier=".cg"), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def turn(  # type: ignore[no-untyped-def]
    tables,
    layers,
    objects,
    units,
    INTO_A: tl.constexpr,
    FAR: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    SIZES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    SIZES_A: tl.constexpr,
    TILE_A: tl.constexpr,
    SIZES_B: tl.constexpr,
    TILE_B: tl.constexpr,
    SHAPE: tl.constexpr,
    ORDER: tl.constexpr,
):
    """One tile at a time: read in the order of one side, written in the order of the other.

    `SHAPE` are the tile's loops in the order of the side that is read, `ORDER` their permutation to the other's.
    """
    for item in range(tl.program_id(0), layers * objects * units * COUNT, tl.num_programs(0)):
        a, b, there = _row(tables, layers, objects, units, item // COUNT, True)
        if there:
            element = tl.arange(0, TILE)
            from_a = tl.multiple_of((a).to(tl.pointer_type(ELEMENT)), ALIGN) + _inside(item % COUNT, SIZES, A, FAR)
            from_b = tl.multiple_of((b).to(tl.pointer_type(ELEMENT)), ALIGN) + _inside(item % COUNT, SIZES, B, FAR)
            from_a += _inside(element, SIZES_A, TILE_A, FAR)
            from_b += _inside(element, SIZES_B, TILE_B, FAR)
            if INTO_A:
                tile = tl.reshape(tl.load(from_b, cache_modifier=".cg"), SHAPE)
                tl.store(from_a, tl.reshape(tl.permute(tile, ORDER), (TILE,)))
            else:
                tile = tl.reshape(tl.load(from_a, cache_modifier=".cg"), SHAPE)
                tl.store(from_b, tl.reshape(tl.permute(tile, ORDER), (TILE,)))


KERNELS = {"run": run, "turn": turn}


def constants(what: Specialisation, *, into_a: bool) -> dict[str, Any]:
    """The compile-time arguments of a specialisation's kernel, by name."""
    out: dict[str, Any] = {
        "INTO_A": into_a,
        "FAR": what.far,
        "ELEMENT": _ELEMENTS[what.width],
        "ALIGN": what.align,
        "SIZES": what.a.sizes,
        "A": what.a.strides,
        "B": what.b.strides,
        "COUNT": what.count,
        "TILE": what.tile,
    }
    if what.kind == "run":
        return out | {"ROWS": what.rows}
    shape, order = what.shape_a, what.to_b
    if into_a:
        shape, order = tuple(shape[i] for i in order), tuple(order.index(i) for i in range(len(order)))
    out |= {"SIZES_A": what.tile_a.sizes, "TILE_A": what.tile_a.strides}
    out |= {"SIZES_B": what.tile_b.sizes, "TILE_B": what.tile_b.strides}
    return out | {"SHAPE": shape, "ORDER": order}


def copy_rows(
    copy: RowCopy,
    *,
    into_a: bool,
    device: torch.device,
    stream: torch.Stream | None = None,
    max_programs: int | None = None,
    trusted: bool = False,
) -> None:
    """Move every row, from A to B or (`into_a`) from B to A, on `stream` (default: the current one of `device`).

    Returns at once; the memory must stay until the stream is through.

    Args:
        copy: all addresses are such as `device` can reach: its own memory, or pinned host memory.
        into_a: direction.
        device: where the kernel runs.
        stream: a stream of `device`.
        max_programs: no more programs than these at a time, to leave compute to others.
        trusted: the caller has made sure that no byte is written twice.

    Raises:
        CopyError: rows that are written overlap; nothing was launched.
    """
    if not trusted:
        check_copy(copy, into_a=into_a)
    with torch.accelerator.device_index(device.index), nullcontext() if stream is None else stream:
        for part in parts(copy):
            work = launch_of(part)
            if work.items:
                _launch(work, into_a, device, max_programs)


def _launch(work: Launch, into_a: bool, device: torch.device, max_programs: int | None) -> None:
    tables = torch.from_numpy(work.tables)
    if device.type != "cpu":
        tables = tables.pin_memory().to(device, non_blocking=True)
    with _first_launch:  # of one kernel, by two threads at a time, is a race in Triton
        _run(work, into_a, device, tables, max_programs)


def _run(work: Launch, into_a: bool, device: torch.device, tables: torch.Tensor, max_programs: int | None) -> None:
    grid = (min(work.items, max_programs or _PROGRAMS),)
    KERNELS[work.what.kind][grid](
        tables,
        work.layers,
        work.objects,
        work.units,
        **constants(work.what, into_a=into_a),
        num_warps=work.what.warps(_lanes(device)),
    )


def _lanes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32
