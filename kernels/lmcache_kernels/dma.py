"""Copies long contiguous pieces with the copy engine: in batched driver calls where available, otherwise one by one.

`cuMemcpyBatchAsync` is looked up in the driver library through ctypes; nothing is compiled. It exists since CUDA 12.8 and lost
its argument `failIdx` in 13.0; `cuGetProcAddress` is called with version 12.8, whose signature newer drivers keep. The first
error is logged, and PyTorch's `copy_` is used from then on. ROCm and XPU always use `copy_`.
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

_IN_STREAM_ORDER = (
    1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: earlier work of the stream writes the sources (staging memory)
)
_VERSION = (
    12080  # newer drivers keep this version's signature; how older drivers react to newer versions is undocumented
)


class _Location(ctypes.Structure):  # CUmemLocation; zero = no hint
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """`CUmemcpyAttributes` of cuda.h, 24 bytes."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", _Location),
        ("dstLocHint", _Location),
        ("flags", ctypes.c_uint),
    )


_P, _N, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
PROTOTYPE = ctypes.CFUNCTYPE(_INT, _P, _P, _P, _N, _P, _P, _N, _P, _P)
"""C signature of `cuMemcpyBatchAsync` in 12.8: dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, failIdx, hStream."""


class DriverError(RuntimeError):
    """A driver call returned an error."""


class Driver:
    """The functions used from one driver library.

    Args:
        library: libcuda as loaded by ctypes, or an object with functions of the same C signatures.

    Raises:
        DriverError: the library has no batched copy.
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
        """Enqueues copies on a stream (given by its handle). They run in any order, so they must not overlap.

        Raises:
            DriverError: contains the driver's error code. Earlier batches of this call stay enqueued.
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
        """Makes the stream's context current, as driver calls require; a thread that has not used CUDA has no context."""
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
    """Maps addresses to the tensors that contain them: flat uint8 tensors sorted by address, with vectorised lookup.

    Keeps the tensors alive. Host and device addresses can coincide on some devices: use one `Memory` for each.

    Args:
        tensors: dense or strided tensors; each covers its whole storage.
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
            if not kept or end > kept[-1][1]:  # otherwise contained in another, e.g. memory that is mapped twice
                kept.append((start, end, storages[start]))
        self.tensors = tuple(tensor for _, _, tensor in kept)
        self._starts = np.array([start for start, _, _ in kept], dtype=np.int64)
        self._ends = np.array([end for _, end, _ in kept], dtype=np.int64)

    def find(self, addresses: Ints, nbytes: Ints) -> tuple[Ints, Ints]:
        """Returns the index into `tensors` and the byte offset of each range, both int64 `(ranges,)`.

        Raises:
            ValueError: a range is not contained in one tensor.
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
    """Returns the CUDA driver's handle of a stream, or `None` if it is not a CUDA stream or not valid for batched copies.

    The driver rejects the legacy default stream (0 or 1).
    """
    handle = getattr(stream, "cuda_stream", None)
    if handle is None and isinstance(stream, torch.Stream) and stream.device.type == "cuda":
        handle = getattr(stream, "native_handle", None)  # since torch 2.13; not in its type stubs
    return int(handle) if torch.version.hip is None and handle is not None and handle > 1 else None


class Dma:
    """Runs copy descriptors on a stream. Thread-safe.

    Args:
        driver: provides batched copies, see `find_driver`; `None` = use `copy_` only.
        say: called once with a message when batched copies stop being used.
        handle: returns the driver's handle of a stream, or `None` if the driver does not accept the stream.
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
        """Enqueues copies. They run in any order: no destination may overlap another destination or a source.

        Args:
            dst, src, nbytes: int64 `(copies,)`, absolute addresses and lengths.
            into, out_of: the memory of the destinations and of the sources.
            stream: where to enqueue; must also be the device's current stream, for `copy_` (`Streams.launch` ensures it).
            pinned: the host side is page-locked. If not, `copy_` is used, which blocks this thread.

        Raises:
            ValueError: an address is in no tensor of its side, or the lists differ in length. Nothing was copied.
        """
        if not dst.shape == src.shape == nbytes.shape:  # the driver would read past the end of the shorter list
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
        except DriverError as error:  # repeating the copies already enqueued, on the same stream, writes the same bytes
            if self.driver is not None:
                self.driver = None
                self._say(f"copies go one by one from now on: {error}")
            return False
        return True


def find_driver(device: torch.device, say: Callable[[str], object] = lambda line: None) -> Driver | None:
    """Returns the driver for batched copies on `device`, or `None` after passing the reason to `say`."""
    if device.type != "cuda" or torch.version.cuda is None:
        say(f"copies go one by one: {device.type} has no batched copy here")
        return None
    try:
        return Driver(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except (OSError, DriverError) as error:
        say(f"copies go one by one: {error}")
        return None
