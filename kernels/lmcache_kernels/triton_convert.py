"""Converts rows while copying them: the Triton kernel of `quantise`, bit for bit equal to the plain torch version there.

Callers: planned for the lossy and lossless codecs of the file format; nothing calls this today.

Addresses are as in `triton_copy`. Arithmetic is in fp32 and rounding is done on integers, so that every device and the
interpreter round alike.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
import triton
import triton.language as tl

from lmcache_kernels.checks import CopyError, check_buffers, check_copy
from lmcache_kernels.launch import MOST, tables_of
from lmcache_kernels.quantise import FLOATS, LARGEST, Conversion, conversion
from lmcache_kernels.rowcopy import RowCopy

_PROGRAMS = 1 << 12
COUNTS = ("layers", "objects", "units", "items")


@triton.jit(do_not_specialize=COUNTS)
def convert(  # type: ignore[no-untyped-def]
    tables,
    factors,
    layers,
    objects,
    units,
    items,
    INTO_A: tl.constexpr,
    FLOAT: tl.constexpr,  # A's elements: 0 = fp32, 1 = fp16, 2 = bf16
    FP8: tl.constexpr,  # B's elements: e4m3fn, or int8
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,  # elements of a run if the tile does not divide it, else 0
    CHUNKS: tl.constexpr,  # tiles per run
    PLACES: tl.constexpr,  # tiles per row
    OUTER: tl.constexpr,  # ((positions, step on A, step on B, whether this loop is over heads), …), innermost first
    HEADS: tl.constexpr,
    A_VECTOR: tl.constexpr,
    B_VECTOR: tl.constexpr,
):
    """Converts A's floats × factor → B's codes, or B's codes × factor → A's floats (`INTO_A`).

    factors: fp32 `(objects, layers, heads)`. Rounds to nearest even, on integers; see `quantise`.
    """
    a_width: tl.constexpr = 4 if FLOAT == 0 else 2
    word: tl.constexpr = tl.int32 if FLOAT == 0 else tl.int16
    lane = tl.arange(0, TILE).to(tl.int64)
    steps = (items + ROWS - 1) // ROWS
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        item = step * ROWS + tl.arange(0, ROWS)
        there = item < items
        row = item // PLACES
        place = item % PLACES
        unit = row % units
        obj = row // units % objects
        layer = row // units // objects
        lists = tables + 2 * layers + objects
        a = tl.load(lists + units + (obj.to(tl.int64) * units + unit), mask=there, other=-1)
        there = a >= 0
        a += tl.load(tables + layer, mask=there, other=0)
        b = tl.load(lists + unit, mask=there, other=0)
        b += tl.load(tables + layers + layer, mask=there, other=0)
        b += tl.load(tables + 2 * layers + obj, mask=there, other=0)
        head = item * 0
        rest = place
        for loop in tl.static_range(len(OUTER)):
            turn = rest % OUTER[loop][0]
            rest = rest // OUTER[loop][0]
            a += turn.to(tl.int64) * OUTER[loop][1]
            b += turn.to(tl.int64) * OUTER[loop][2]
            if OUTER[loop][3]:
                head = turn
        factor = tl.load(factors + ((obj.to(tl.int64) * layers + layer) * HEADS + head), mask=there, other=0.0)
        mask = there[:, None] & (lane >= 0)[None, :]
        if LIMIT > 0:
            mask = mask & ((place % CHUNKS * TILE)[:, None] + lane[None, :] < LIMIT)
        pa = (a[:, None] + lane[None, :] * a_width).to(tl.pointer_type(word))
        pb = (b[:, None] + lane[None, :]).to(tl.pointer_type(tl.int8))
        pa = tl.max_contiguous(tl.multiple_of(pa, [a_width, A_VECTOR]), [1, A_VECTOR // a_width])
        pb = tl.max_contiguous(tl.multiple_of(pb, [1, B_VECTOR]), [1, B_VECTOR])
        mask = tl.max_constancy(mask, [1, B_VECTOR])
        if INTO_A:
            code = tl.load(pb, mask=mask, other=0, cache_modifier=".cg").to(tl.int32)
            if FP8:
                size = code & 0x7F
                normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
                value = tl.where(size >= 8, normal, size.to(tl.float32) * 0.001953125)  # 2⁻⁹
                value = (value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
                value = tl.where(size == 0x7F, float("nan"), value) * factor[:, None]
            else:
                value = code.to(tl.float32) * factor[:, None]
            bits = value.to(tl.int32, bitcast=True)
            unordered = (bits & 0x7FFFFFFF) > 0x7F800000
            if FLOAT == 2:
                even = (bits >> 16) & 1
                half = ((bits + (0x7FFF + even)) >> 16).to(tl.int16)
                tl.store(pa, tl.where(unordered, 0x7FC0, half).to(tl.int16), mask=mask)
            elif FLOAT == 1:
                half = value.to(tl.float16).to(tl.int16, bitcast=True)
                tl.store(pa, tl.where(unordered, 0x7E00, half).to(tl.int16), mask=mask)
            else:
                tl.store(pa, tl.where(unordered, 0x7FC00000, bits), mask=mask)
        else:
            raw = tl.load(pa, mask=mask, other=0, cache_modifier=".cg")
            if FLOAT == 2:
                value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            elif FLOAT == 1:
                value = raw.to(tl.float16, bitcast=True).to(tl.float32)
            else:
                value = raw.to(tl.float32, bitcast=True)
            bits = (value * factor[:, None]).to(tl.int32, bitcast=True)
            size = bits & 0x7FFFFFFF
            sign = (bits >> 24) & 0x80
            unordered = size > 0x7F800000
            if FP8:
                size = tl.where(size > 0x43E00000, 0x43E00000, size)  # 448
                normal = ((size + (0x7FFFF + ((size >> 20) & 1))) >> 20) - 960
                # fp32 near 2¹⁴ has a spacing of 2⁻⁹, like e4m3's subnormals: adding 2¹⁴ rounds to them, to nearest even.
                tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
                code = tl.where(size >= 0x3C800000, normal, tiny)
                code = tl.where(unordered, 0x7F, code) | sign
            else:
                size = tl.where(size > 0x42FE0000, 0x42FE0000, size)  # 127
                # fp32 near 2²³ has a spacing of 1.
                whole = (size.to(tl.float32, bitcast=True) + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
                code = tl.where(unordered, 0, tl.where(sign != 0, -whole, whole))
            tl.store(pb, code.to(tl.int8), mask=mask)


def convert_rows(
    copy: RowCopy,
    scales: torch.Tensor,
    *,
    into_a: bool,
    dtype: torch.dtype,
    kind: torch.dtype,
    head_loop: int | None,
    stream: torch.Stream | None = None,
    max_programs: int | None = None,
    trusted: bool = False,
) -> None:
    """Quantises rows from side A to side B, or (`into_a`) converts them back. Asynchronous, like `copy_rows`.

    Args:
        copy: as for `copy_rows`, except that the innermost loop counts *elements*: of `dtype` on A, of one byte on B. All
            other numbers are bytes of their own side.
        scales: fp32 `(objects, layers, heads)`, contiguous, on the device that runs the kernel.
        into_a: convert codes back to floats.
        dtype: dtype of side A: fp32, fp16 or bf16.
        kind: dtype of side B: `float8_e4m3fn` or `int8`.
        head_loop: index of the loop in `copy.dims` that counts heads; None if rows hold one head.
        stream, max_programs, trusted: as for `copy_rows`.

    Raises:
        CopyError: an unsupported dtype, shape or address, or rows that are written twice.
    """
    if dtype not in FLOATS or kind not in LARGEST:
        raise CopyError(
            f"cannot convert {dtype} ⇄ {kind}: supported are {', '.join(map(str, FLOATS))} ⇄ {list(LARGEST)}"
        )
    if head_loop is not None and not 0 <= head_loop < len(copy.dims) - 1:
        raise CopyError(f"head_loop {head_loop} is not one of the {len(copy.dims) - 1} loops over runs")
    if scales.dtype != torch.float32:
        raise CopyError(f"scales are {scales.dtype}; they must be torch.float32")
    check_buffers(scales)
    lanes = 64 if torch.version.hip else 32
    chosen = conversion(copy, into_a=into_a, dtype=dtype, kind=kind, head_loop=head_loop, lanes=lanes)
    if tuple(scales.shape) != (copy.objects, copy.layers, chosen.heads) or not scales.is_contiguous():
        raise CopyError(
            f"scales of shape {tuple(scales.shape)} must be contiguous {(copy.objects, copy.layers, chosen.heads)}"
        )
    if not trusted:
        written = (copy.run * (dtype.itemsize if into_a else 1), 1, 1)
        check_copy(replace(copy, dims=(*copy.dims[:-1], written)), into_a=into_a)
    if copy.nbytes == 0:
        return
    if copy.objects * copy.layers * copy.units * chosen.places > MOST:
        raise CopyError(f"more than {MOST} pieces; convert fewer objects at a time")
    with torch.accelerator.device_index(scales.device.index), nullcontext() if stream is None else stream:
        factors = scales if into_a else scales.reciprocal()
        _launch(copy, chosen, factors, max_programs or _PROGRAMS)


def _launch(copy: RowCopy, chosen: Conversion, factors: torch.Tensor, limit: int) -> None:
    tables = torch.from_numpy(tables_of(copy))
    if factors.device.type != "cpu":
        tables = tables.pin_memory().to(factors.device, non_blocking=True)
    items = copy.layers * copy.objects * copy.units * chosen.places
    convert[(min(limit, -(-items // chosen.rows)),)](
        tables,
        factors,
        copy.layers,
        copy.objects,
        copy.units,
        items,
        **chosen.constants(),
        **chosen.options(),
    )
