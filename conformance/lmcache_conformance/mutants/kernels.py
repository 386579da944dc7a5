"""Copy kernels with typical errors."""

from __future__ import annotations

import torch

from lmcache_conformance.mutants import BEYOND, mutant
from lmcache_conformance.suites.kernels import KernelTests
from lmcache_kernels import put_rows, take_rows


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantNegativeIndexWraps(KernelTests):
    """A negative index is not skipped but counts from the end, as in Python."""

    def put(self, target: torch.Tensor, index: torch.Tensor, source: torch.Tensor, partial: bool) -> None:
        """Writes every row."""
        put_rows(target, index % max(1, target.shape[0]), source)


@mutant(row=BEYOND + "the tail of a row is not a whole vector", project="any kernel")
class MutantTailIsForgotten(KernelTests):
    """Does not copy the last elements of a row, which do not fill a vector."""

    def take(self, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """Copies whole vectors of four elements only."""
        wide = source.shape[-1] // 4 * 4 or source.shape[-1]
        whole = torch.empty(out.shape, dtype=out.dtype)
        take_rows(source, index, whole)
        out[..., :wide] = whole[..., :wide]


@mutant(row=BEYOND + "bits are moved as numbers", project="Triton, interpreted bf16")
class MutantValuesAreCanonicalised(KernelTests):
    """Copies values as floats, which changes NaN payloads and −0."""

    def take(self, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """Turns −0 into 0."""
        take_rows(source, index, out)
        if out.dtype == torch.int16:
            values = out.clone().contiguous().view(torch.float16)
            out.copy_(torch.where(values == 0, torch.zeros_like(values), values).view(torch.int16))
