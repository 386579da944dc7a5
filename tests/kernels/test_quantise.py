"""Quantisation while copying: the kernel equals plain torch bit for bit, and plain torch does what is documented."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import interpreted

from lmcache_kernels import CopyError
from lmcache_kernels.quantise import FLOATS, LARGEST, dequantised, quantised, scales_of
from lmcache_kernels.rowcopy import RowCopy

convert_rows = interpreted("triton_convert").convert_rows

FP8, INT8 = torch.float8_e4m3fn, torch.int8
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
N, L, U, S, H, D = 2, 2, 2, 4, 3, 24  # objects, layers, units, slots, heads, dim; a run is not a multiple of 16
SPECIAL = [
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    448.0,
    -448.0,
    464.0,
    465.0,
    127.5,
    -127.5,
    126.5,
    0.5,
    1.5,
]
SPECIAL += [2.5, -0.5, 2**-6, 2**-9, 2**-10, 3 * 2**-10, 2**-11, 1e-7, -1e-7, 1e-40, 6e4]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(BITS[a.itemsize]), b.contiguous().view(BITS[b.itemsize]))


def paged(floats: torch.Tensor, codes: torch.Tensor, skip: bool = False) -> RowCopy:
    """Head-first pages of floats `(L, pages, H, S, D)` ⇄ codes `(N, L, U, S, H, D)`."""
    e = floats.itemsize
    page = torch.tensor([[3, 0], [4, -1 if skip else 1]]).numpy() * (H * S * D * e)
    row = S * H * D
    return RowCopy(
        a_base=floats.data_ptr() + np.arange(L, dtype=np.int64) * floats[0].numel() * e,
        a_units=page.astype(np.int64),
        b_base=codes.data_ptr() + np.arange(N, dtype=np.int64) * (L * U * row),
        b_layers=np.arange(L, dtype=np.int64) * (U * row),
        b_units=np.arange(U, dtype=np.int64) * row,
        dims=((S, D * e, H * D), (H, S * D * e, D), (D, 1, 1)),
    )


def in_objects(floats: torch.Tensor) -> torch.Tensor:
    """The pages selected by `paged` as `(N, L, U, S, H, D)`."""
    return floats[:, [[3, 0], [4, 1]]].permute(1, 0, 2, 4, 3, 5)


@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pages_become_codes_and_come_back_as_torch_has_it(dtype: torch.dtype, kind: torch.dtype) -> None:
    floats = (torch.randn(L, 5, H, S, D, generator=torch.Generator().manual_seed(1)) * 30).to(dtype)
    floats[0, 3, 0, 0, : len(SPECIAL[:D])] = torch.tensor(SPECIAL[:D]).to(dtype)
    values = in_objects(floats)
    scales = scales_of(values.permute(0, 1, 4, 2, 3, 5).flatten(3), kind)
    assert scales.shape == (N, L, H)
    wide = scales[:, :, None, None, :, None]
    codes = torch.full((N, L, U, S, H, D), 99, dtype=torch.uint8)
    convert_rows(paged(floats, codes), scales, into_a=False, dtype=dtype, kind=kind, head_loop=1)
    assert same(codes.view(kind), quantised(values, wide, kind))
    back = torch.full_like(floats, 7)
    convert_rows(paged(back, codes), scales, into_a=True, dtype=dtype, kind=kind, head_loop=1)
    assert same(in_objects(back), dequantised(codes.view(kind), wide, dtype))
    assert same(back[:, 2], torch.full_like(back[:, 2], 7)), "a page that nobody named was written"


@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-90, 3e30])
def test_every_half_and_many_floats(dtype: torch.dtype, kind: torch.dtype, scale: float) -> None:
    """All 65,536 bit patterns of two bytes, as many of four bytes, and then all codes."""
    if dtype == torch.float32:
        bits = torch.randint(-(1 << 31), 1 << 31, (65536,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
        bits[: len(SPECIAL)] = torch.tensor(SPECIAL).view(torch.int32)
    else:
        bits = torch.arange(65536).to(torch.int16)
    values, codes = bits.view(dtype), torch.zeros(65536, dtype=torch.uint8)
    scales, zero = torch.full((1, 1, 1), scale), np.zeros(1, dtype=np.int64)

    def copy(floats: torch.Tensor) -> RowCopy:
        ends = zero + floats.data_ptr(), zero.reshape(1, 1), zero + codes.data_ptr()
        return RowCopy(*ends, zero, zero, ((65536, 1, 1),))

    convert_rows(copy(values), scales, into_a=False, dtype=dtype, kind=kind, head_loop=None)
    assert same(codes.view(kind), quantised(values, scales[0, 0], kind))
    codes.copy_(torch.arange(65536).to(torch.uint8))
    back = torch.zeros(65536, dtype=dtype)
    convert_rows(copy(back), scales, into_a=True, dtype=dtype, kind=kind, head_loop=None)
    assert same(back, dequantised(codes.view(kind), scales[0, 0], dtype))


def test_rows_that_are_skipped_stay() -> None:
    floats, codes = torch.ones(L, 5, H, S, D), torch.full((N, L, U, S, H, D), 99, dtype=torch.uint8)
    convert_rows(
        paged(floats, codes, skip=True), torch.ones(N, L, H), into_a=False, dtype=torch.float32, kind=INT8, head_loop=1
    )
    assert codes[1, :, 1].eq(99).all()
    assert codes[0].eq(1).all()


def test_saturation_nan_infinity_and_minus_zero() -> None:
    values = torch.tensor(
        [1e9, -1e9, float("inf"), -float("inf"), float("nan"), -0.0, 464.0, 465.0, 2**-10, 3 * 2**-10]
    )
    one = torch.ones(1)
    assert quantised(values, one, FP8).view(torch.uint8).tolist() == [
        0x7E,
        0xFE,
        0x7E,
        0xFE,
        0x7F,
        0x80,
        0x7E,
        0x7E,
        0,
        2,
    ]
    assert quantised(values, one, INT8).tolist() == [127, -127, 127, -127, 0, 0, 127, 127, 0, 0]
    assert quantised(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), one, INT8).tolist() == [0, 2, 2, 0, -2]
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert quantised(negative_nan, one, FP8).view(torch.uint8).tolist() == [0xFF]
    codes = torch.tensor([0x7F, 0xFF, 0x80, 1], dtype=torch.uint8).view(FP8)
    back = dequantised(codes, one, torch.bfloat16).view(torch.int16).tolist()
    assert back == [0x7FC0, 0x7FC0, -0x8000, 0x3B00]


def test_scales_bring_the_largest_finite_value_to_the_largest_code() -> None:
    values = torch.tensor([[1.0, -896.0, float("inf")], [float("nan"), 0.0, -0.0], [1e-40, 0.0, 0.0]])
    scales = scales_of(values, FP8)
    assert scales[0] == 2.0
    assert (scales > 0).all()
    assert scales.reciprocal().isfinite().all()
    assert quantised(values, scales[:, None], FP8)[0].float().tolist() == [0.5, -448.0, 448.0]


def test_what_cannot_be_converted_says_so() -> None:
    floats, codes = torch.ones(L, 5, H, S, D), torch.zeros(N, L, U, S, H, D, dtype=torch.uint8)
    copy, ones = paged(floats, codes), torch.ones(N, L, H)
    with pytest.raises(CopyError, match="int16"):
        convert_rows(copy, ones, into_a=False, dtype=torch.int16, kind=INT8, head_loop=1)
    with pytest.raises(CopyError, match="scales of shape"):
        convert_rows(copy, torch.ones(N, L, 1), into_a=False, dtype=torch.float32, kind=INT8, head_loop=1)
    with pytest.raises(CopyError, match=r"torch\.float64"):
        convert_rows(copy, ones.double(), into_a=False, dtype=torch.float32, kind=INT8, head_loop=1)
    with pytest.raises(CopyError, match="head_loop 2"):
        convert_rows(copy, ones, into_a=False, dtype=torch.float32, kind=INT8, head_loop=2)
    copy.a_base[:] += 2
    with pytest.raises(CopyError, match="aligned"):
        convert_rows(copy, ones, into_a=False, dtype=torch.float32, kind=INT8, head_loop=1)
    copy.a_base[:] -= 2
    copy.a_units[0, 0] = copy.a_units[1, 0]
    with pytest.raises(CopyError):
        convert_rows(copy, ones, into_a=True, dtype=torch.float32, kind=INT8, head_loop=1)
