"""Half the bytes: floats become fp8 (e4m3fn) or int8 with one fp32 scale per object, layer and head, and back.

Lossy, so never part of a bit-exact cache; who wants it says so. Semantics, the same in the Triton kernel and in torch:

- code = round to nearest even(value × (1 / scale)), the reciprocal and the product rounded to fp32;
- finite values beyond the largest code, and infinities, become the largest code of their sign (448, 127);
- NaN becomes fp8's NaN, with its sign; int8 has none and stores 0;
- −0 stays −0 in fp8, and is 0 in int8; −128 is never written;
- back: code × scale in fp32, then rounded to nearest even to the dtype; a NaN comes back as the dtype's plain quiet NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmcache_kernels.checks import CopyError
from lmcache_kernels.launch import ACCESS_BYTES, EDGE_BYTES
from lmcache_kernels.rowcopy import RowCopy

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes that can be converted, and their number in the kernel."""

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Dtypes of codes, and their largest."""

_SMALLEST = 2.0**-100  # of amax: below it, a value is 0 to any model, and the scale's reciprocal would not be finite
_QUIET = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_WARPS = 4
_SHARE = 64  # bytes of floats that a thread converts at once: 16 codes or more, one wide access


def scales_of(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Scale that brings the largest finite magnitude to the largest code: fp32, `values.shape[:-1]` reduced over the last axis.

    Args:
        values: `(…, n)`, the n values that share a scale along the last axis. NaN and infinities do not count.
        kind: `float8_e4m3fn` or `int8`.
    """
    size = values.float().abs()
    amax = torch.where(size.isfinite(), size, 0).amax(-1)
    return amax.clamp(min=_SMALLEST) / LARGEST[kind]


def quantised(values: torch.Tensor, scales: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Codes of `values`, plain torch. `scales`: fp32, broadcasts against `values`."""
    scaled = values.float() * scales.reciprocal()
    limit = LARGEST[kind]
    if kind == torch.int8:
        return torch.where(scaled.isnan(), 0, scaled.clamp(-limit, limit).round()).to(torch.int8)
    codes = scaled.clamp(-limit, limit).to(kind).view(torch.uint8)
    sign = (scaled.view(torch.int32) >> 24 & 0x80).to(torch.uint8)
    return torch.where(scaled.isnan(), sign | 0x7F, codes).view(kind)


def dequantised(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of `codes` in `dtype`, plain torch. `scales`: fp32, broadcasts against `codes`."""
    values = codes.float() * scales
    quiet = torch.tensor(_QUIET[dtype], dtype=_BITS[dtype], device=codes.device)
    return torch.where(values.isnan(), quiet, values.to(dtype).view(_BITS[dtype])).view(dtype)


@dataclass(frozen=True)
class Conversion:
    """The compile-time constants of `convert_kernel`; see there."""

    into_a: bool
    number: int
    fp8: bool
    rows: int
    tile: int
    limit: int
    chunks: int
    places: int
    outer: tuple[tuple[int, int, int, bool], ...]
    heads: int
    a_vector: int
    b_vector: int

    def constants(self) -> dict[str, Any]:
        """`convert_kernel`'s constexpr arguments."""
        return {
            "INTO_A": self.into_a,
            "FLOAT": self.number,
            "FP8": self.fp8,
            "ROWS": self.rows,
            "TILE": self.tile,
            "LIMIT": self.limit,
            "CHUNKS": self.chunks,
            "PLACES": self.places,
            "OUTER": self.outer,
            "HEADS": self.heads,
            "A_VECTOR": self.a_vector,
            "B_VECTOR": self.b_vector,
        }

    def options(self) -> dict[str, int | bool]:
        """Compiler options; a product and a sum must round twice, as they do in torch."""
        return {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": False}


def conversion(
    copy: RowCopy, *, into_a: bool, dtype: torch.dtype, kind: torch.dtype, head_loop: int | None, lanes: int = 32
) -> Conversion:
    """How to convert this copy's rows; pure, see `triton_convert.convert_rows`; `lanes`: of a warp."""
    step = _WARPS * lanes * _SHARE
    width = dtype.itemsize
    elements = copy.run
    tile = tile_of_run(elements, width, step)
    chunks = -(-elements // tile)
    outer = [(chunks, tile * width, tile, False)] if chunks > 1 else []
    for i, (size, a, b) in reversed(list(enumerate(copy.dims[:-1]))):
        if size > 1:
            outer.append((size, a, b, i == head_loop))
    a_bits = np.bitwise_or.reduce([*copy.a_base, *copy.a_units[copy.a_units >= 0], *(a for _, a, _, _ in outer)])
    b_bits = np.bitwise_or.reduce([*copy.b_base, *copy.b_layers, *copy.b_units, *(b for _, _, b, _ in outer)])
    a_vector = int(np.gcd.reduce([ACCESS_BYTES, int(a_bits), elements * width, tile * width]))
    b_vector = int(np.gcd.reduce([ACCESS_BYTES, int(b_bits), elements, tile]))
    if a_vector < width:
        raise CopyError(f"elements of {width} bytes on side A must be aligned; addresses are multiples of {a_vector}")
    return Conversion(
        into_a=into_a,
        number=FLOATS[dtype],
        fp8=kind == torch.float8_e4m3fn,
        rows=max(1, step // (tile * width)),
        tile=tile,
        limit=elements if elements % tile else 0,
        chunks=chunks,
        places=int(np.prod([size for size, *_ in outer], dtype=np.int64)),
        outer=tuple(outer),
        heads=1 if head_loop is None else copy.dims[head_loop][0],
        a_vector=a_vector,
        b_vector=b_vector,
    )


def tile_of_run(size: int, width: int, budget: int) -> int:
    """Elements of a run that are one item: a divisor where that is long enough, otherwise the last one is ragged."""
    divisor = size & -size
    if divisor == size or divisor * width >= 2 * EDGE_BYTES:
        return min(divisor, budget // width)
    return min(1 << (size - 1).bit_length(), budget // width)
