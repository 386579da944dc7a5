"""Memory made present before it is needed: the first touch of a page costs more than copying into it.

A kernel hands out zeroed pages when they are first written, and a virtual machine's host may have to find them first: filling
fresh memory then runs at a tenth of memcpy's speed. A thread of its own touches the pages ahead of whoever fills them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import torch

_POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE`: Linux 5.14 and newer; elsewhere nothing is warmed, and nothing else changes."""

_PIECE_BYTES = 32 << 20
_PAGE = 4096


class Warmer:
    """Keeps the next `ahead` bytes of a growing use of memory present.

    Args:
        ahead: bytes.
        total: bytes there are.
        memory: `memory(offset)` → the uint8 tensor from this offset to the end of its allocation; it may allocate.
    """

    def __init__(self, ahead: int, total: int, memory: Callable[[int], torch.Tensor]) -> None:
        self._ahead = ahead
        self._total = total
        self._memory = memory
        self._lock = threading.Lock()
        self._done = 0
        self._wanted = 0
        self._running = False
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self.reached(0)

    def reached(self, offset: int) -> None:
        """Memory is in use up to `offset`."""
        wanted = min(self._total, offset + self._ahead)
        with self._lock:
            # Not for every little step: a thread is started when half of the lead is gone.
            if self._libc is None or wanted <= self._wanted or (wanted < self._total and self._lead(wanted)):
                return
            self._wanted = wanted
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="lmcache-warm", daemon=True).start()

    def _lead(self, wanted: int) -> bool:
        return self._wanted > 0 and wanted - self._wanted < self._ahead // 2

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._done >= self._wanted:
                    self._running = False
                    return
                start = self._done
                size = min(_PIECE_BYTES, self._wanted - start)
            try:
                size = self._touch(start, size)
            except (MemoryError, RuntimeError):  # there is not as much memory as was hoped for: not our concern
                size = 0
            with self._lock:
                self._done = start + size if size else self._total

    def _touch(self, start: int, size: int) -> int:
        """Bytes made present; 0 where that is not possible."""
        memory = self._memory(start)
        first = memory.data_ptr()
        size = min(size, memory.numel())
        begin = first // _PAGE * _PAGE
        end = -(-(first + size) // _PAGE) * _PAGE
        assert self._libc is not None
        failed = self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _POPULATE_WRITE)
        return 0 if failed else size
