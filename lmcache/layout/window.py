"""One flat view over separately allocated host tensors, so that one copy can access the pages of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class _Memory:
    """numpy's array interface over addresses [start, start + nbytes). Keeps the owners of the used ranges alive."""

    def __init__(self, start: int, nbytes: int, owners: Sequence[torch.Tensor]) -> None:
        self.owners = tuple(owners)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (start, False)}


def host_window(storages: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Returns a uint8 tensor from the first to the last byte of flat host `storages`, and each storage's offset in it.

    Bytes between the storages belong to other allocations and must not be accessed: use offsets within a storage only.
    Nothing is copied or allocated.
    """
    spans = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes) for storage in storages if storage.nbytes]
    if not spans:
        return storages[0], (0,) * len(storages)
    start, stop = min(low for low, _ in spans), max(high for _, high in spans)
    window = torch.from_numpy(np.asarray(_Memory(start, stop - start, storages)))
    return window, tuple(max(0, storage.data_ptr() - start) for storage in storages)
