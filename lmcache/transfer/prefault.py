"""Prefaults memory in the background, because the first write to a page costs more than copying into it.

The kernel provides and zeroes a page on its first write, and under virtualisation the host may have to provide it too: filling
fresh memory then runs at a tenth of memcpy's speed. A separate thread populates the pages ahead of their use.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import torch

_POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE`, Linux 5.14 and newer; elsewhere nothing is prefaulted."""

_PIECE_BYTES = 2 << 20
"""Bytes per `madvise`: it locks the address space, and a thread that starts meanwhile waits for it."""
_PAGE = 4096


class Warmer:
    """Keeps `ahead` bytes beyond the memory in use prefaulted.

    Args:
        ahead: bytes.
        total: total bytes of the memory.
        memory: `memory(offset)` → uint8 tensor from this offset to the end of its allocation; it may allocate.
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
        """Reports that memory is in use up to `offset`."""
        wanted = min(self._total, offset + self._ahead)
        with self._lock:
            # Starts a thread only once half of the prefaulted memory is used up.
            if self._libc is None or wanted <= self._wanted or (wanted < self._total and self._enough(wanted)):
                return
            self._wanted = wanted
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="lmcache-warm", daemon=True).start()

    def _enough(self, wanted: int) -> bool:
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
                size = self._populate(start, size)
            except (MemoryError, RuntimeError):  # out of memory: reported when the slots are used
                size = 0
            with self._lock:
                self._done = start + size if size else self._total

    def _populate(self, start: int, size: int) -> int:
        """Returns how many bytes were prefaulted; 0 if that is not possible."""
        memory = self._memory(start)
        first = memory.data_ptr()
        size = min(size, memory.numel())
        begin = first // _PAGE * _PAGE
        end = -(-(first + size) // _PAGE) * _PAGE
        assert self._libc is not None
        failed = self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _POPULATE_WRITE)
        return 0 if failed else size
