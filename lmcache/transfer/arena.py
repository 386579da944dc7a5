"""Arenas: equal slots of device or host memory, one arena per layer group.

The index decides which slot holds what; an arena only owns the bytes. Equal slots mean O(1) reuse and no fragmentation.
Memory grows in slabs as slots are first used, from a *provider*: anonymous pages (huge pages asked for where the kernel has
them), pinned host memory for GPU copies, or any device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import torch

from lmcache.errors import ConfigError
from lmcache.memory import Provider, anonymous
from lmcache.transfer.prefault import Warmer

_SLAB_BYTES = 1 << 30
_ALIGN = 4096


class Arena:
    """`slots` slots of `slot_bytes` bytes each, allocated in slabs on first use. Thread-safe.

    Args:
        slots: how many slots there are; 0 is allowed.
        slot_bytes: bytes per slot; rounded up to 4 KiB inside, so that every slot is page-aligned.
        provider: where slabs come from.
        slab_bytes: size of a slab (at least one slot).
        ahead_bytes: so much memory beyond what is in use is made present in the background, see `lmcache.transfer.prefault`.
        reserve: take all slabs now. For pinned memory, of which a GiB takes up to a second under a lock of the driver.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        provider: Provider = anonymous,
        *,
        slab_bytes: int = _SLAB_BYTES,
        ahead_bytes: int = 0,
        reserve: bool = False,
    ) -> None:
        if slots < 0 or slot_bytes < 1:
            raise ConfigError(f"an arena needs slots >= 0 and slot_bytes >= 1, got {slots} and {slot_bytes}")
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.stride = -(-slot_bytes // _ALIGN) * _ALIGN
        self._per_slab = max(1, min(slots, slab_bytes // self.stride))
        self._provider = provider
        self._slabs: dict[int, torch.Tensor] = {}
        self._views: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        if reserve:
            with contextlib.suppress(MemoryError):  # then slots of what could not be had fail when they are used
                for slab in range(-(-slots // self._per_slab)):
                    self._slab(slab)
        self._warmer = Warmer(ahead_bytes, slots * self.stride, self._from) if ahead_bytes and slots else None

    def view(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8, shape `(slot_bytes,)`. Neighbouring slots of one slab are `stride` bytes apart.

        Raises:
            MemoryError: the slab that holds this slot cannot be allocated.
            IndexError: there is no such slot.
        """
        found = self._views.get(slot)
        if found is not None:
            return found
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is outside of [0, {self.slots})")
        slab, position = divmod(slot, self._per_slab)
        memory = self._slab(slab)
        with self._lock:
            view = memory[position * self.stride : position * self.stride + self.slot_bytes]
            self._views[slot] = view
        if self._warmer is not None:
            self._warmer.reached((slot + 1) * self.stride)
        return view

    def views(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Returns `view` of each of these slots."""
        known = self._views
        return [known[slot] if slot in known else self.view(slot) for slot in slots]

    def _slab(self, slab: int) -> torch.Tensor:
        with self._lock:
            memory = self._slabs.get(slab)
            if memory is None:
                count = min(self._per_slab, self.slots - slab * self._per_slab)
                try:
                    memory = self._provider(count * self.stride)
                except RuntimeError as error:  # torch's out-of-memory errors
                    raise MemoryError(str(error)) from error
                self._slabs[slab] = memory
            return memory

    def _from(self, offset: int) -> torch.Tensor:
        """The memory from an offset into all slots on, up to its slab's end."""
        slab, inside = divmod(offset, self._per_slab * self.stride)
        return self._slab(slab)[inside:]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slabs so far."""
        with self._lock:
            return sum(slab.numel() for slab in self._slabs.values())


def share_out(budget: int, sizes: Sequence[int]) -> list[int]:
    """Arena slots per group: as many chunks as `budget` bytes hold of *all* groups together, and a few way stations.

    `sizes` are bytes per object of each group. However small the budget, some slots exist towards the tiers below.
    """
    return [max(_WAY_STATIONS, budget // sum(sizes))] * len(sizes)


_WAY_STATIONS = 8
