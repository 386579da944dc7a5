"""Stands in for SGLang's CUDA kernels where there is no GPU: the one function a CPU engine calls, in torch. Test-only.

Everything else can be imported, for SGLang does so at module level, and raises when called. There is no
`convert_weight_packed`, so SGLang believes that AMX is not there and takes its torch-native paths.
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
    """Write each request's new slots, one run after another in `slots`, into its row of `table` at [start, end)."""
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
