"""Which mover serves which device: Triton where it compiles, tensor operations anywhere else.

CUDA, ROCm (whose devices torch calls `cuda` too) and XPU copy rows by Triton. Host memory has a path of its own
(`reference`), which never comes here. Any other device, and any device on which a kernel could not be compiled or
launched, is served by torch operations; that is said once, counted, and never tried again in this process.
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
    """Device type → why tensor operations, not kernels, move its bytes. Empty where all is well."""
    with _lock:
        return dict(_served_by_torch)


def copy_by_kernel(copies: Sequence[RowCopy], *, into_a: bool, device: torch.device) -> bool:
    """Copy all rows on `device`'s current stream; False = nothing here can, use tensor operations for all of them.

    Raises:
        CopyError: the copies themselves are wrong.
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
    """Copy rows, of slots that were checked, on the current stream by the kernel of `device`; raises what went wrong."""
    kernel_for(device)(copy, into_a=into_a, device=device, max_programs=max_programs, trusted=True)


def served_by_torch(device: torch.device) -> bool:
    """Whether kernels were given up on devices of this type."""
    with _lock:
        return device.type in _served_by_torch


def kernel_for(device: torch.device) -> RowsKernel:
    """The kernel that copies rows on this device; `NotImplementedError` if there is none."""
    if device.type not in TRITON_DEVICES:
        raise NotImplementedError(f"no kernels for devices of type {device.type!r}")
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("Triton is not installed; `pip install triton` brings the kernels")
    from lmcache_kernels.triton_copy import copy_rows

    return copy_rows


def give_up(device: torch.device, error: Exception) -> None:
    """From now on tensor operations serve devices of this type; the first time it is said why."""
    reason = f"{type(error).__name__}: {error}"
    with _lock:
        first = _served_by_torch.setdefault(device.type, reason) is reason
    if first:
        text = reason.splitlines()[0][:200]
        _LOG.warning(
            "kernels-unavailable device=%s detail=%r; slower tensor operations copy instead", device.type, text
        )
