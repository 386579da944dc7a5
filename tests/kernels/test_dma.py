"""Copy descriptors through a fake driver (ctypes callbacks with the C signatures of cuda.h), and one by one."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_kernels import dma as dma_module
from lmcache_kernels.dma import PROTOTYPE, Attributes, Dma, Driver, DriverError, Memory, find_driver, handle_of

P = ctypes.POINTER
VOID = ctypes.c_void_p
FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, P(VOID), ctypes.c_int, ctypes.c_uint64, P(ctypes.c_int))
GET = ctypes.CFUNCTYPE(ctypes.c_int, P(VOID))
SET = ctypes.CFUNCTYPE(ctypes.c_int, VOID)
OF_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, VOID, P(VOID))
STREAM = 0x7F00
NEWER = ctypes.CFUNCTYPE(  # without failIdx, as in the headers of CUDA 13
    ctypes.c_int, VOID, VOID, VOID, ctypes.c_size_t, VOID, VOID, ctypes.c_size_t, VOID
)


class FakeLibrary:
    """A fake libcuda of CUDA `version` that copies host memory. Returns error `fails` from call number `after` on."""

    def __init__(self, version: int = 13000, fails: int = 0, after: int = 0) -> None:
        self.version, self.fails, self.after = version, fails, after
        self.calls: list[int] = []
        self.contexts: list[int | None] = []
        self.current: int | None = None
        self.batch = {
            12080: PROTOTYPE(lambda *a: self.copy(*a[:7], a[8], a[7])),
            13000: NEWER(lambda *a: self.copy(*a, None)),
        }
        self.cuGetProcAddress_v2 = FIND(self.find)
        self.cuCtxGetCurrent = GET(self.get)
        self.cuCtxSetCurrent = SET(self.set)
        self.cuStreamGetCtx = OF_STREAM(self.of_stream)

    def find(self, name: bytes, where: Any, version: int, flags: int, status: Any) -> int:
        assert (name, flags) == (b"cuMemcpyBatchAsync", 0)
        if version > self.version:
            return 1  # CUDA_ERROR_INVALID_VALUE: newer than the driver
        known = [v for v in self.batch if v <= version]
        where[0] = ctypes.cast(self.batch[max(known)], VOID).value
        status[0] = 0
        return 0

    def get(self, out: Any) -> int:
        out[0] = self.current
        return 0

    def set(self, context: int | None) -> int:
        self.current = context
        return 0

    def of_stream(self, stream: int, out: Any) -> int:
        out[0] = stream + 1
        return 0

    def copy(
        self, dst: int, src: int, sizes: int, count: int, attrs: int, firsts: int, kinds: int, stream: int, failed: Any
    ) -> int:
        attributes = Attributes.from_address(attrs)
        hints = [getattr(hint, f) for hint in (attributes.srcLocHint, attributes.dstLocHint) for f in ("type", "id")]
        assert (attributes.srcAccessOrder, hints, attributes.flags, kinds) == (1, [0, 0, 0, 0], 0, 1)
        assert ctypes.c_size_t.from_address(firsts).value == 0
        assert stream == STREAM
        self.contexts.append(self.current)
        self.calls.append(count)
        lists = [(ctypes.c_uint64 * count).from_address(p) for p in (dst, src, sizes)]
        if self.fails and len(self.calls) > self.after:
            for d, s, n in list(zip(*lists, strict=True))[: count // 2]:
                ctypes.memmove(d, s, n)
            if failed:
                ctypes.c_size_t.from_address(failed).value = count // 2
            return self.fails
        for d, s, n in zip(*lists, strict=True):
            ctypes.memmove(d, s, n)
        return 0


def noise(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8)


def descriptors(src: torch.Tensor, dst: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes = np.arange(count, dtype=np.int64) % 5 + 1
    at = np.cumsum(sizes) - sizes
    return dst.data_ptr() + at[::-1], src.data_ptr() + at[::-1], sizes[::-1]  # negative strides, as slices can have


def test_the_attributes_are_those_of_the_header() -> None:
    assert ctypes.sizeof(Attributes) == 24
    assert [getattr(Attributes, n).offset for n, *_ in Attributes._fields_] == [0, 4, 12, 20]


@pytest.mark.parametrize("version", [12080, 12090, 13000, 13010, 14000])
@pytest.mark.parametrize("count", [0, 1, 7, 1024, 2500])
def test_descriptors_reach_the_driver_whatever_its_version(version: int, count: int) -> None:
    library = FakeLibrary(version)
    driver = Driver(library)
    src, dst = noise(8000), torch.zeros(8000, dtype=torch.uint8)
    d, s, n = descriptors(src, dst, count)
    said: list[str] = []
    dma = Dma(driver, say=said.append, handle=lambda stream: STREAM)
    dma.copy(d, s, n, into=Memory([dst]), out_of=Memory([src]))
    total = int(n.sum())
    assert torch.equal(dst[:total], src[:total])
    assert not dst[total:].any()
    assert (sum(library.calls), max(library.calls, default=0) <= dma_module.BATCH) == (count, True)
    assert not said
    # A thread without a context gets the stream's context for the duration of the call only.
    assert set(library.contexts) <= {STREAM + 1}
    assert library.current is None


@pytest.mark.parametrize("version", [12080, 13000])
@pytest.mark.parametrize("after", [0, 1])
def test_a_driver_that_fails_is_said_once_and_the_bytes_arrive_all_the_same(version: int, after: int) -> None:
    library = FakeLibrary(version, fails=201, after=after)
    src, dst = noise(8000), torch.zeros(8000, dtype=torch.uint8)
    d, s, n = descriptors(src, dst, 2000)
    said: list[str] = []
    dma = Dma(Driver(library), say=said.append, handle=lambda stream: STREAM)
    for _ in range(2):
        dst.zero_()
        dma.copy(d, s, n, into=Memory([dst]), out_of=Memory([src]))
        total = int(n.sum())
        assert torch.equal(dst[:total], src[:total])
    [line] = said
    assert "201" in line
    assert "descriptor" in line
    assert len(library.calls) == after + 1
    assert dma.driver is None
    assert library.current is None


def test_a_context_that_cannot_be_had_is_a_failure_like_any_other() -> None:
    library = FakeLibrary()
    library.cuStreamGetCtx = OF_STREAM(lambda stream, out: 400)
    with pytest.raises(DriverError, match="cuStreamGetCtx: CUDA error 400"):
        Driver(library).copy(*(np.zeros(1, dtype=np.int64),) * 3, STREAM)


def test_a_driver_without_the_call_is_no_driver() -> None:
    with pytest.raises(DriverError, match=r"12\.8"):
        Driver(FakeLibrary(12070))
    with pytest.raises(DriverError, match=r"12\.0"):
        Driver(object())
    said: list[str] = []
    assert find_driver(torch.device("cpu"), said.append) is None
    assert said == ["copies go one by one: cpu has no batched copy here"]


@pytest.mark.parametrize("pinned", [True, False])
def test_streams_and_memory_that_the_driver_does_not_take_are_copied_one_by_one(pinned: bool) -> None:
    library = FakeLibrary()
    src, dst = noise(64), torch.zeros(64, dtype=torch.uint8)
    dma = Dma(Driver(library), handle=(lambda stream: None) if pinned else (lambda stream: STREAM))
    d, s, n = descriptors(src, dst, 9)
    dma.copy(d, s, n, into=Memory([dst]), out_of=Memory([src]), pinned=pinned)
    assert torch.equal(dst[: int(n.sum())], src[: int(n.sum())])
    assert not library.calls


@pytest.mark.parametrize(("handle", "want"), [(0, None), (1, None), (2, 2), (0x55550, 0x55550)])
def test_the_legacy_default_stream_is_not_given_to_the_driver(handle: int, want: int | None) -> None:
    class Stream:
        cuda_stream = handle

    assert handle_of(Stream()) == want
    assert handle_of(None) is None


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    asks=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.integers(0, 60)), max_size=20),
)
def test_addresses_are_found_in_the_tensor_that_holds_them(sizes: list[int], asks: list[tuple[int, int, int]]) -> None:
    tensors = [noise(n) for n in sizes]
    memory = Memory([t[n // 2 :] for t, n in zip(tensors, sizes, strict=True)] + tensors[:1])
    for which, offset, n in asks:
        tensor = tensors[which % len(tensors)]
        at, length = np.array([tensor.data_ptr() + offset]), np.array([n])
        if offset + n <= tensor.shape[0] and offset < tensor.shape[0]:
            [i], [j] = memory.find(at, length)
            assert torch.equal(memory.tensors[i][j : j + n], tensor[offset : offset + n])
        elif offset + n > tensor.shape[0] + 64:  # minimum distance between allocations
            with pytest.raises(ValueError, match="no tensor holds"):
                memory.find(at, length)


def test_nothing_is_copied_when_an_address_is_foreign() -> None:
    src, dst = noise(8), torch.zeros(8, dtype=torch.uint8)
    at = np.array([dst.data_ptr(), dst.data_ptr() + 6])
    with pytest.raises(ValueError, match="no tensor holds 4 bytes"):
        Dma().copy(at, np.array([src.data_ptr()] * 2), np.array([4, 4]), into=Memory([dst]), out_of=Memory([src]))
    with pytest.raises(ValueError, match="no tensor holds"):
        Memory([]).find(at, np.array([1, 1]))
    assert not dst.any()


def test_lists_of_different_lengths_never_reach_the_driver() -> None:
    src, dst = noise(8), torch.zeros(8, dtype=torch.uint8)
    library = FakeLibrary()
    with pytest.raises(ValueError, match="descriptors"):
        Dma(Driver(library), handle=lambda stream: STREAM).copy(
            np.array([dst.data_ptr()]),
            np.array([src.data_ptr()]),
            np.zeros(0, dtype=np.int64),
            into=Memory([dst]),
            out_of=Memory([src]),
        )
    assert not library.calls


def test_memory_that_lies_inside_other_memory_is_found() -> None:
    outer = noise(100)
    inner = torch.from_numpy(outer.numpy()[20:40])  # a separate storage over the same bytes
    memory = Memory([inner, outer])
    assert len(memory.tensors) == 1
    [i], [j] = memory.find(np.array([outer.data_ptr() + 70]), np.array([30]))
    assert (i, j) == (0, 70)


def test_a_real_cuda_stream_has_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device-independent streams have no `cuda_stream`, only a `native_handle`, which can be read without a device."""
    stream = torch.Stream(stream_id=3, device_index=0, device_type=1)
    assert not hasattr(stream, "cuda_stream")
    assert hasattr(torch.Stream, "native_handle")

    class Cuda(torch.Stream):
        native_handle = 0x7F00

    assert handle_of(Cuda(stream_id=3, device_index=0, device_type=1)) == 0x7F00
