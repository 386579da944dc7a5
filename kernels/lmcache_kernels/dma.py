"""Copies of long pieces by the copy engine: many in one driver call where there is such a call, else one by one.

`cuMemcpyBatchAsync` is found in the driver library itself, through ctypes: nothing is compiled. It exists from CUDA 12.8 on,
and lost its argument `failIdx` in 13.0; `cuGetProcAddress` is asked for 12.8's by number, which newer drivers keep, so what
is called always has the signature that is meant. Anything that goes wrong with it is said once, and from then on PyTorch's
`copy_` does the work.
ROCm and XPU always use `copy_`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from lmcache_kernels.rowcopy import Ints

BATCH = 1024
"""Descriptors per driver call. Calls with 50 000 were reported to crash or hang drivers (vLLM issue 49276)."""

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are staging that earlier work of the stream writes
_VERSION = (
    12080  # newer drivers keep the signature under this number; what older ones say to a newer number is not written
)


class _Location(ctypes.Structure):  # CUmemLocation; zero: no hint
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h, 24 bytes."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", _Location),
        ("dstLocHint", _Location),
        ("flags", ctypes.c_uint),
    )


_P, _N, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
PROTOTYPE = ctypes.CFUNCTYPE(_INT, _P, _P, _P, _N, _P, _P, _N, _P, _P)
"""C signature of 12.8's `cuMemcpyBatchAsync`: dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, failIdx, hStream."""


class DriverError(RuntimeError):
    """A driver call returned an error."""


class Driver:
    """The calls used of one driver library.

    Args:
        library: libcuda as ctypes loaded it, or an object with functions of the same C signatures.

    Raises:
        DriverError: it has no batched copy.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._batch = self._find(library)

    @staticmethod
    def _find(library: Any) -> Any:
        try:
            find = library.cuGetProcAddress_v2
            for needed in ("cuCtxGetCurrent", "cuCtxSetCurrent", "cuStreamGetCtx"):
                getattr(library, needed)
        except AttributeError as error:
            raise DriverError("the driver is older than CUDA 12.0") from error
        where, status = ctypes.c_void_p(), ctypes.c_int()
        code = find(
            ctypes.c_char_p(b"cuMemcpyBatchAsync"),
            ctypes.byref(where),
            ctypes.c_int(_VERSION),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
        if code or not where.value:
            raise DriverError("the driver has no cuMemcpyBatchAsync (CUDA 12.8)")
        return PROTOTYPE(where.value)

    def copy(self, dst: Ints, src: Ints, nbytes: Ints, stream: int) -> None:
        """Enqueue copies on a stream (its handle). The order among them is undefined; they must not overlap.

        Raises:
            DriverError: with the driver's code. Copies of earlier batches of this call are enqueued.
        """
        dst, src, nbytes = (np.ascontiguousarray(x, dtype=np.int64) for x in (dst, src, nbytes))
        attributes, first = Attributes(srcAccessOrder=_IN_STREAM_ORDER), ctypes.c_size_t(0)
        failed = ctypes.c_size_t(2**64 - 1)
        with self._context_of(stream):
            for i in range(0, len(dst), BATCH):
                part = slice(i, i + BATCH)
                code = self._batch(
                    dst[part].ctypes.data,
                    src[part].ctypes.data,
                    nbytes[part].ctypes.data,
                    len(dst[part]),
                    ctypes.byref(attributes),
                    ctypes.byref(first),
                    1,
                    ctypes.byref(failed),
                    stream,
                )
                if code:
                    which = f", descriptor {i + failed.value}" if failed.value < len(dst) else ""
                    raise DriverError(f"cuMemcpyBatchAsync: CUDA error {code}{which}")

    def _context_of(self, stream: int) -> AbstractContextManager[None]:
        """Driver calls need the stream's context to be current; a thread that has not used CUDA has none."""
        held, wanted = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuCtxGetCurrent", ctypes.byref(held))
        self._check("cuStreamGetCtx", ctypes.c_void_p(stream), ctypes.byref(wanted))
        if held.value == wanted.value:
            return nullcontext()
        return _Current(self, held, wanted)

    def _check(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            raise DriverError(f"{name}: CUDA error {code}")


class _Current(AbstractContextManager[None]):
    def __init__(self, driver: Driver, held: ctypes.c_void_p, wanted: ctypes.c_void_p) -> None:
        self._driver, self._held, self._wanted = driver, held, wanted

    def __enter__(self) -> None:
        self._driver._check("cuCtxSetCurrent", self._wanted)

    def __exit__(self, *error: object) -> None:
        self._driver._check("cuCtxSetCurrent", self._held)


class Memory:
    """Which tensor holds an address: flat uint8 tensors sorted by address, looked up for many addresses at once.

    It keeps what it was made of alive. Host and device addresses may be equal on some devices: use one `Memory` for each.

    Args:
        tensors: any dense or strided tensors; each stands for the whole of its storage.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start not in storages or storages[start].shape[0] < storage.nbytes():
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                storages[start] = flat.set_(storage, 0, (storage.nbytes(),), (1,))
        kept: list[tuple[int, int, torch.Tensor]] = []
        for start in sorted(storages):
            end = start + storages[start].shape[0]
            if not kept or end > kept[-1][1]:  # else it lies inside another, as memory that is mapped twice does
                kept.append((start, end, storages[start]))
        self.tensors = tuple(tensor for _, _, tensor in kept)
        self._starts = np.array([start for start, _, _ in kept], dtype=np.int64)
        self._ends = np.array([end for _, end, _ in kept], dtype=np.int64)

    def find(self, addresses: Ints, nbytes: Ints) -> tuple[Ints, Ints]:
        """Which of `tensors` holds each range, and at which offset.

        Raises:
            ValueError: a range is not inside one of them.
        """
        which = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        bad = which < 0
        if not bad.any():
            bad = addresses + nbytes > self._ends[which]
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise ValueError(f"no tensor holds {int(nbytes[i])} bytes at {int(addresses[i]):#x}")
        return which, addresses - self._starts[which]


def handle_of(stream: object) -> int | None:
    """A stream's number for the CUDA driver, or `None` if it is no CUDA stream or the batched copy refuses it.

    The legacy default stream (0 or 1) is refused by the driver.
    """
    handle = getattr(stream, "cuda_stream", None)
    if handle is None and isinstance(stream, torch.Stream) and stream.device.type == "cuda":
        handle = getattr(stream, "native_handle", None)  # since torch 2.13; not in its type stubs
    return int(handle) if torch.version.hip is None and handle is not None and handle > 1 else None


class Dma:
    """Executes descriptors on a stream. Thread-safe.

    Args:
        driver: batched copies, or `None` for `copy_` alone; `find_driver` finds it.
        say: told once, in a sentence, why batched copies are not (or no longer) used.
        handle: a stream's number for `driver`, or `None` if it does not take that stream.
    """

    def __init__(
        self,
        driver: Driver | None = None,
        *,
        say: Callable[[str], object] = lambda line: None,
        handle: Callable[[object], int | None] = handle_of,
    ) -> None:
        self.driver = driver
        self._say = say
        self._handle = handle

    def copy(
        self,
        dst: Ints,
        src: Ints,
        nbytes: Ints,
        *,
        into: Memory,
        out_of: Memory,
        stream: object = None,
        pinned: bool = True,
    ) -> None:
        """Enqueue copies. The order among them is undefined: no destination may overlap another or a source.

        Args:
            dst, src, nbytes: int64 `(copies,)`, absolute addresses and lengths.
            into, out_of: the memory of either side.
            stream: where; it must be the device's current stream too, for `copy_` (`Streams.launch` sees to that).
            pinned: the host side is page-locked. If not, `copy_` is used, which lets this thread wait.

        Raises:
            ValueError: an address belongs to no tensor of its side, or the lists differ in length. Nothing was copied.
        """
        if not dst.shape == src.shape == nbytes.shape:  # the driver would read past the end of the shorter
            raise ValueError(f"descriptors of shapes {dst.shape}, {src.shape} and {nbytes.shape}")
        to, there = into.find(dst, nbytes)
        of, here = out_of.find(src, nbytes)
        if self.driver is not None and pinned and len(dst):
            handle = self._handle(stream)
            if handle is not None and self._batched(self.driver, dst, src, nbytes, handle):
                return
        for i, j, k, m, n in zip(*(x.tolist() for x in (to, there, of, here, nbytes)), strict=True):
            into.tensors[i][j : j + n].copy_(out_of.tensors[k][m : m + n], non_blocking=True)

    def _batched(self, driver: Driver, dst: Ints, src: Ints, nbytes: Ints, handle: int) -> bool:
        try:
            driver.copy(dst, src, nbytes, handle)
        except DriverError as error:  # what was enqueued is enqueued again, in the same stream: the bytes are the same
            if self.driver is not None:
                self.driver = None
                self._say(f"copies go one by one from now on: {error}")
            return False
        return True


def find_driver(device: torch.device, say: Callable[[str], object] = lambda line: None) -> Driver | None:
    """Batched copies for `device`, or `None` after saying why not."""
    if device.type != "cuda" or torch.version.cuda is None:
        say(f"copies go one by one: {device.type} has no batched copy here")
        return None
    try:
        return Driver(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except (OSError, DriverError) as error:
        say(f"copies go one by one: {error}")
        return None
