"""Allocates host memory: pageable (anonymous) or pinned."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Literal

import torch

from lmcache.errors import ConfigError

Provider = Callable[[int], torch.Tensor]
"""Number of bytes → one-dimensional uint8 tensor of that size; raises `MemoryError` or `RuntimeError` on failure."""


def anonymous(nbytes: int) -> torch.Tensor:
    """Allocates pageable host memory, with huge pages if possible: first touch is several times faster, TLB misses are fewer."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise MemoryError(f"cannot allocate {nbytes} bytes of host memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # EINVAL on kernels without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def pinned(nbytes: int) -> torch.Tensor:
    """Allocates page-locked host memory, which a GPU reads and writes at full link speed."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def why_not_pinned() -> str | None:
    """Returns why memory cannot be pinned on this machine, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    try:
        pinned(4096)
    except RuntimeError as error:  # WSL2 and containers with a locked-memory limit
        return f"pinned allocation failed: {str(error).splitlines()[0]}"
    return None


def host_provider(pin: Literal["auto", "always", "never"]) -> tuple[Provider, str]:
    """Returns the fastest allocator of host memory that works here, and one line with the choice and its reason.

    Raises:
        ConfigError: `pin` is "always", but memory cannot be pinned.
    """
    if pin == "never":
        return anonymous, "pageable memory: pin_memory is 'never'"
    reason = why_not_pinned()
    if reason is None:
        return pinned, "pinned memory"
    if pin == "always":
        raise ConfigError(
            f"pin_memory is 'always', but {reason}; use pin_memory='auto' to continue with pageable memory"
        )
    return anonymous, f"pageable memory: {reason}"
