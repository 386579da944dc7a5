"""Arenas: memory divided into slots of equal size, one arena per layer group.

The index decides which slot holds which object; an arena only owns the memory. Equal sizes allow O(1) reuse without
fragmentation. Memory is allocated in slabs when slots are first used, by a *provider*: anonymous pages (huge pages where the
kernel has them), pinned host memory for GPU copies, or memory of any device.
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
        slots: number of slots; 0 is allowed.
        slot_bytes: bytes per slot; slots start at multiples of 4 KiB, so that each is page-aligned.
        provider: allocates slabs.
        slab_bytes: size of a slab (at least one slot).
        ahead_bytes: bytes beyond the slots in use that are prefaulted in the background, see `lmcache.transfer.prefault`.
        reserve: allocate all slabs now. For pinned memory: a GiB takes up to a second under a lock of the driver.
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
            with contextlib.suppress(MemoryError):  # slots of the missing slabs fail when they are used
                for slab in range(-(-slots // self._per_slab)):
                    self._slab(slab)
        self._warmer = Warmer(ahead_bytes, slots * self.stride, self._memory_from) if ahead_bytes and slots else None

    def view(self, slot: int) -> torch.Tensor:
        """Returns the slot's memory: uint8 `(slot_bytes,)`. Adjacent slots of one slab are `stride` bytes apart.

        Raises:
            MemoryError: the slab that contains this slot cannot be allocated.
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

    def _memory_from(self, offset: int) -> torch.Tensor:
        """Returns the memory from `offset`, counted over all slots, to the end of its slab."""
        slab, inside = divmod(offset, self._per_slab * self.stride)
        return self._slab(slab)[inside:]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all allocated slabs."""
        with self._lock:
            return sum(slab.numel() for slab in self._slabs.values())


def share_out(budget: int, sizes: Sequence[int]) -> list[int]:
    """Returns the slots of each group's arena: the number of chunks, of all groups together, that fit into `budget` bytes.

    `sizes` are bytes per object of each group. There are always a few slots, because tiers are read and written through them.
    """
    return [max(_MIN_SLOTS, budget // sum(sizes))] * len(sizes)


_MIN_SLOTS = 8
