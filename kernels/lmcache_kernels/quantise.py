"""Quantises floats to fp8 (e4m3fn) or int8 with one fp32 scale per object, layer and head, and back.

Callers: planned for the lossy and lossless codecs of the file format; nothing calls this today.

Lossy, so it is never part of a bit-exact cache and must be requested explicitly. Semantics, the same in the Triton kernel and
in torch:

- code = round to nearest even(value × (1 / scale)), the reciprocal and the product rounded to fp32;
- finite values beyond the largest code, and infinities, become the largest code of their sign (448, 127);
- NaN becomes fp8's NaN, with its sign; int8 has no NaN and stores 0;
- −0 stays −0 in fp8 and becomes 0 in int8; −128 is never written;
- back: code × scale in fp32, then rounded to nearest even to the dtype; a NaN becomes the dtype's default quiet NaN.
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
"""Dtypes that can be converted → their number in the kernel."""

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Dtypes of codes → the largest code."""

_SMALLEST = (
    2.0**-100
)  # lower bound of amax: smaller values are 0 to any model, and the scale's reciprocal would overflow
_QUIET = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_WARPS = 4
_BYTES_PER_THREAD = 64  # bytes of floats that a thread converts at once: 16 codes or more, one wide access


def scales_of(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Returns the scales that map the largest finite magnitude to the largest code, fp32 `values.shape[:-1]`.

    Args:
        values: `(…, n)`; the n values along the last axis share a scale. NaN and infinities are ignored.
        kind: `float8_e4m3fn` or `int8`.
    """
    size = values.float().abs()
    amax = torch.where(size.isfinite(), size, 0).amax(-1)
    return amax.clamp(min=_SMALLEST) / LARGEST[kind]


def quantised(values: torch.Tensor, scales: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Quantises `values` in plain torch. `scales`: fp32, broadcast against `values`."""
    scaled = values.float() * scales.reciprocal()
    limit = LARGEST[kind]
    if kind == torch.int8:
        return torch.where(scaled.isnan(), 0, scaled.clamp(-limit, limit).round()).to(torch.int8)
    codes = scaled.clamp(-limit, limit).to(kind).view(torch.uint8)
    sign = (scaled.view(torch.int32) >> 24 & 0x80).to(torch.uint8)
    return torch.where(scaled.isnan(), sign | 0x7F, codes).view(kind)


def dequantised(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts `codes` back to `dtype` in plain torch. `scales`: fp32, broadcast against `codes`."""
    values = codes.float() * scales
    quiet = torch.tensor(_QUIET[dtype], dtype=_BITS[dtype], device=codes.device)
    return torch.where(values.isnan(), quiet, values.to(dtype).view(_BITS[dtype])).view(dtype)


@dataclass(frozen=True)
class Conversion:
    """The compile-time constants of `triton_convert.convert`; see there."""

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
        """The constexpr arguments of `triton_convert.convert`, by name."""
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
        """Compiler options; no fused multiply-add, so that a product and a sum round separately, as in torch."""
        return {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": False}


def conversion(
    copy: RowCopy, *, into_a: bool, dtype: torch.dtype, kind: torch.dtype, head_loop: int | None, lanes: int = 32
) -> Conversion:
    """Derives the kernel constants for a copy's rows; arguments as for `triton_convert.convert_rows`.

    Args:
        lanes: threads per warp.

    Raises:
        CopyError: floats on side A are not aligned to their size.
    """
    step = _WARPS * lanes * _BYTES_PER_THREAD
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
    """Elements per tile of a run: a power of two that divides the run if that is long enough, else the last tile is partial."""
    divisor = size & -size
    if divisor == size or divisor * width >= 2 * EDGE_BYTES:
        return min(divisor, budget // width)
    return min(1 << (size - 1).bit_length(), budget // width)
