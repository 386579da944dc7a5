"""Selects the copy implementation of a device: Triton where it compiles, tensor operations everywhere else.

CUDA, ROCm (also `cuda` in torch) and XPU copy rows with Triton. Host memory is handled elsewhere (`reference`, `hostrows`).
Every other device, and every device type for which a kernel failed to compile or launch, falls back to torch operations; the
fallback is logged once, counted, and lasts for the lifetime of the process.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from threading import Lock

import torch

from lmcache_kernels.checks import CopyError
from lmcache_kernels.rowcopy import RowCopy

TRITON_DEVICES = ("cuda", "xpu")

RowsKernel = Callable[..., None]
"""`kernel(copy, into_a=…, device=…)`, see `lmcache_kernels.triton_copy.copy_rows`."""

_LOG = logging.getLogger("lmcache")
_lock = Lock()
_served_by_torch: dict[str, str] = {}


def fallbacks() -> dict[str, str]:
    """Device type → the reason why tensor operations copy instead of kernels. Empty if no device fell back."""
    with _lock:
        return dict(_served_by_torch)


def copy_by_kernel(copies: Sequence[RowCopy], *, into_a: bool, device: torch.device) -> bool:
    """Copies all rows on the current stream of `device`.

    Returns:
        False if there is no working kernel: the caller must copy all rows with tensor operations.

    Raises:
        CopyError: the copies themselves are invalid.
    """
    if served_by_torch(device):
        return False
    try:
        for copy in copies:
            copy_one(copy, into_a=into_a, device=device)
    except CopyError:
        raise
    except Exception as error:
        give_up(device, error)
        return False
    return True


def copy_one(copy: RowCopy, *, into_a: bool, device: torch.device, max_programs: int | None = None) -> None:
    """Copies rows on the current stream with the kernel of `device`; slots must have been checked. Does not fall back."""
    kernel_for(device)(copy, into_a=into_a, device=device, max_programs=max_programs, trusted=True)


def served_by_torch(device: torch.device) -> bool:
    """Whether devices of this type have fallen back to tensor operations."""
    with _lock:
        return device.type in _served_by_torch


def kernel_for(device: torch.device) -> RowsKernel:
    """Returns the kernel that copies rows on this device; raises `NotImplementedError` if there is none."""
    if device.type not in TRITON_DEVICES:
        raise NotImplementedError(f"no kernels for devices of type {device.type!r}")
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("Triton is not installed; `pip install triton` to enable the kernels")
    from lmcache_kernels.triton_copy import copy_rows

    return copy_rows


def give_up(device: torch.device, error: Exception) -> None:
    """Makes devices of this type use tensor operations from now on; logs the reason the first time."""
    reason = f"{type(error).__name__}: {error}"
    with _lock:
        first = _served_by_torch.setdefault(device.type, reason) is reason
    if first:
        text = reason.splitlines()[0][:200]
        _LOG.warning(
            "kernels-unavailable device=%s detail=%r; slower tensor operations copy instead", device.type, text
        )
