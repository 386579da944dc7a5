"""Copies rows between an engine's pages and objects on a GPU: one kernel family, driven by addresses alone.

Bits are copied as the widest integers that alignment allows. `run` copies rows whose innermost loop is contiguous on both
sides; `turn` reads a tile in the order of one side and writes it in the order of the other, so that both accesses are wide;
the compiler transposes it in shared memory. Programs iterate over the work items of all layers, objects and pages of a
launch, so that their number can be limited to what the forward pass can spare.
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

_launch_lock = Lock()

COUNTS = ("layers", "objects", "units")
"""Arguments that must not be specialised, so that one compiled kernel, also one compiled ahead of time, fits all sizes."""


@triton.jit
def _row(tables, layers, objects, units, row, there):  # type: ignore[no-untyped-def]
    """Addresses of rows on both sides, and `there` restricted to rows that are resident."""
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
    """Copies `TILE` elements of `ROWS` rows at a time, in order; a row has `COUNT` elements."""
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
    """Copies one tile at a time: reads it in the order of one side and writes it in the order of the other.

    `SHAPE` has the sizes of the tile's loops in the order of the side that is read, `ORDER` their permutation to the other.
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
    """Returns the compile-time arguments of a specialisation's kernel, by name."""
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
    """Copies every row from A to B, or (`into_a`) from B to A, on `stream` (default: the current stream of `device`).

    Asynchronous: the memory must stay allocated until the stream has finished the copy.

    Args:
        copy: all addresses must be accessible to `device`: its own memory, or pinned host memory.
        into_a: direction.
        device: the device that runs the kernel.
        stream: a stream of `device`.
        max_programs: maximum number of programs, to leave compute to other work.
        trusted: the caller guarantees that no byte is written twice.

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
    with _launch_lock:  # the first launch of a kernel by two threads at once is a race in Triton
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
