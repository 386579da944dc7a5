"""Prefaulting: pages are resident before their first use, and written data stays."""

from __future__ import annotations

import ctypes
import sys
import threading
import time

import pytest
import torch

from lmcache import CacheEngine
from lmcache.memory import anonymous
from lmcache.transfer.arena import Arena
from lmcache_conformance.labs.kv_pool import tiny_config, tiny_spec

MIB = 1 << 20
PAGE = 4096

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is prefaulted on Linux only")


def present(memory: torch.Tensor) -> int:
    """Returns the resident bytes of a mapping."""
    pages = memory.numel() // PAGE
    found = (ctypes.c_ubyte * pages)()
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(pages * PAGE), found)
    assert not failed
    return sum(page & 1 for page in found) * PAGE


def eventually(memory: torch.Tensor, least: int) -> int:
    until = time.monotonic() + 20
    while present(memory) < least and time.monotonic() < until:
        time.sleep(0.01)
    return present(memory)


def supported() -> bool:
    memory = anonymous(4 * PAGE)
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(PAGE), 23)


@pytest.mark.skipif(not supported(), reason="this kernel has no MADV_POPULATE_WRITE")
def test_the_next_slots_are_resident_before_they_are_used() -> None:
    slabs: list[torch.Tensor] = []

    def provider(nbytes: int) -> torch.Tensor:
        slabs.append(anonymous(nbytes))
        return slabs[-1]

    arena = Arena(128, MIB, provider, ahead_bytes=8 * MIB)
    until = time.monotonic() + 20
    while not slabs and time.monotonic() < until:
        time.sleep(0.01)
    assert eventually(slabs[0], 8 * MIB) >= 8 * MIB
    assert present(slabs[0]) < 64 * MIB, "everything is resident, far beyond the slots in use"
    arena.view(0).fill_(7)
    for slot in range(1, 33):
        arena.view(slot)
    assert eventually(slabs[0], 36 * MIB) >= 36 * MIB
    assert bool((arena.view(0) == 7).all()), "what was written is gone"
    assert bool((arena.view(35) == 0).all())


def test_without_prefaulting_nothing_is_allocated_before_its_use() -> None:
    arena = Arena(16, MIB)
    assert arena.allocated_bytes == 0
    arena.view(3)
    assert arena.allocated_bytes > 0


def test_an_engine_that_was_only_opened_and_closed_has_allocated_no_dram() -> None:
    with CacheEngine(tiny_config(dram_bytes=256 * MIB), tiny_spec()) as cache:
        for thread in threading.enumerate():
            if thread.name == "lmcache-warm":
                thread.join(10)
        assert [arena.allocated_bytes for arena in cache._rank.arenas] == [0]
