"""Where host and device memory comes from: anonymous pages, pinned pages, or an accelerator."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Literal

import torch

from lmcache.errors import ConfigError

Provider = Callable[[int], torch.Tensor]
"""Bytes wanted → one-dimensional uint8 tensor of that many bytes; raises `MemoryError` or `RuntimeError` if it cannot."""


def anonymous(nbytes: int) -> torch.Tensor:
    """Pageable host memory. Asks for huge pages: first touch is several times faster, and gathers miss fewer TLB entries."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise MemoryError(f"no {nbytes} bytes of host memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # kernels without transparent huge pages say EINVAL
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def pinned(nbytes: int) -> torch.Tensor:
    """Page-locked host memory, which a GPU reads and writes at the link's speed."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def on_device(device: torch.device) -> Provider:
    """Memory of an accelerator."""
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device)


def why_not_pinned() -> str | None:
    """The reason why pinned memory cannot be had here, or `None` if it can."""
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    try:
        pinned(4096)
    except RuntimeError as error:  # WSL2 and containers with a locked-memory limit
        return f"pinned allocation failed: {str(error).splitlines()[0]}"
    return None


def host_provider(pin: Literal["auto", "always", "never"] = "auto") -> tuple[Provider, str]:
    """The best host memory that works here, and one line that says which and why.

    Raises:
        ConfigError: `pin="always"` where memory cannot be pinned.
    """
    if pin == "never":
        return anonymous, "pageable memory: pin_memory is 'never'"
    reason = why_not_pinned()
    if reason is None:
        return pinned, "pinned memory"
    if pin == "always":
        raise ConfigError(f"pin_memory is 'always', but {reason}; use pin_memory='auto' to go on with pageable memory")
    return anonymous, f"pageable memory: {reason}"
