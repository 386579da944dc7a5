"""Replaces SGLang's CUDA kernels without a GPU: implements the one function that a CPU engine calls, in torch. Test-only.

All other names can be imported, as SGLang does at module level, but raise when called. There is no `convert_weight_packed`, so
SGLang finds no AMX and takes its torch-native paths.
"""

from __future__ import annotations

from typing import Any

import torch


def assign_req_to_token_pool_cpu(
    requests: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    _width: int,
) -> None:
    """Writes each request's new slots, concatenated in `slots`, into its row of `table` at [start, end)."""
    at = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[request, start:end] = slots[at : at + end - start].to(table.dtype)
        at += end - start


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; this is the CPU stand-in of LMCache's tests")

    return absent


__getattr__ = _missing
