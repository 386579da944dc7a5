"""Invalid copies are refused before anything is copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_kernels import CopyError, RowCopy
from lmcache_kernels.address import Dim
from lmcache_kernels.checks import check_buffers, check_copy


def rows(a_units: list[list[int]], dims: tuple[Dim, ...], b_units: list[int] | None = None, layers: int = 1) -> RowCopy:
    def ints(values: object) -> np.ndarray:
        return np.asarray(values, dtype=np.int64)

    count = len(a_units[0])
    step = max(b for _, _, b in dims) * dims[0][0]
    return RowCopy(
        ints([4096 + i * (1 << 20) for i in range(layers)]),
        ints(a_units),
        ints([(1 << 30) + i * (1 << 20) for i in range(len(a_units))]),
        ints([i * (1 << 14) for i in range(layers)]),
        ints(b_units if b_units is not None else [i * step for i in range(count)]),
        dims,
    )


def test_a_page_named_twice_is_refused_with_its_place() -> None:
    copy = rows([[0, 64], [128, 64]], ((64, 1, 1),))
    check_copy(copy, into_a=False)  # reading a page twice is valid
    with pytest.raises(CopyError, match="unit 1 of object 0 and unit 1 of object 1 write the same bytes of the pages"):
        check_copy(copy, into_a=True)


def test_pages_that_overlap_by_one_element_are_refused() -> None:
    with pytest.raises(CopyError, match="at offset 62"):
        check_copy(rows([[0, 62]], ((64, 1, 1),)), into_a=True)


def test_objects_that_overlap_are_refused() -> None:
    copy = rows([[0, 64]], ((64, 1, 1),), b_units=[0, 32])
    check_copy(copy, into_a=True)
    with pytest.raises(CopyError, match="objects"):
        check_copy(copy, into_a=False)


def test_skipped_rows_meet_nobody() -> None:
    check_copy(rows([[0, -1, -1]], ((64, 1, 1),), b_units=[0, 0, 0]), into_a=False)


def test_rows_may_interleave_and_may_not_meet() -> None:
    check_copy(rows([[0, 16]], ((4, 32, 16), (16, 1, 1))), into_a=True)
    with pytest.raises(CopyError):
        check_copy(rows([[0, 8]], ((4, 32, 16), (16, 1, 1))), into_a=True)


def test_layers_at_the_same_place_are_refused() -> None:
    copy = rows([[0]], ((64, 1, 1),), layers=2)
    copy.b_layers[1] = copy.b_layers[0]
    with pytest.raises(CopyError, match="two layers"):
        check_copy(copy, into_a=False)


def test_misaligned_elements_are_refused() -> None:
    with pytest.raises(CopyError, match=r"elements of 4 bytes.*multiples of 2"):
        check_copy(rows([[2]], ((64, 1, 1),)), into_a=True, itemsize=4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_verdict_is_that_of_counting_bytes(data: st.DataObject) -> None:
    size, run = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    stride = data.draw(st.integers(run, 12))
    units = data.draw(st.lists(st.integers(-1, 40), min_size=1, max_size=5))
    copy = rows([units], ((size, stride, run), (run, 1, 1)))
    written: list[int] = []
    for a in copy.rows()[0].tolist():
        for at, _, nbytes in copy.inside():
            written += range(a + at, a + at + nbytes)
    if len(set(written)) == len(written):
        check_copy(copy, into_a=True)
    else:
        with pytest.raises(CopyError):
            check_copy(copy, into_a=True)


def test_tensors_of_one_kernel_agree() -> None:
    one = torch.zeros(4, 8, dtype=torch.int16)
    check_buffers(one, one[:, :4], torch.zeros(0, dtype=torch.int16))
    with pytest.raises(CopyError, match="cpu and meta"):
        check_buffers(one, torch.zeros(4, dtype=torch.int16, device="meta"))
    with pytest.raises(CopyError, match=r"torch\.int16 and torch\.int32"):
        check_buffers(one, one.to(torch.int32))
    with pytest.raises(CopyError, match="has stride 8"):
        check_buffers(one, one.T)
