"""Arenas: slots of equal size, slabs allocated on demand, and the choice of host memory."""

from __future__ import annotations

import pytest
import torch

from lmcache import memory as arenas
from lmcache.errors import ConfigError
from lmcache.memory import anonymous, host_provider
from lmcache.transfer.arena import Arena


def test_slots_are_apart_and_keep_their_bytes() -> None:
    arena = Arena(7, 5000, slab_bytes=3 * 8192)
    for slot in range(7):
        arena.view(slot).fill_(slot + 1)
    for slot in range(7):
        assert arena.view(slot).shape == (5000,)
        assert bool((arena.view(slot) == slot + 1).all())


def test_memory_grows_in_slabs_and_never_beyond_the_slots() -> None:
    arena = Arena(7, 4096, slab_bytes=3 * 4096)
    assert arena.allocated_bytes == 0
    arena.view(0)
    assert arena.allocated_bytes == 3 * 4096
    arena.view(6)
    assert arena.allocated_bytes == 4 * 4096, "the last slab holds the one slot that is left"


def test_slots_of_a_slab_are_one_stride_apart() -> None:
    arena = Arena(4, 100)
    assert arena.view(3).data_ptr() - arena.view(2).data_ptr() == arena.stride == 4096


def test_slots_out_of_range_are_refused() -> None:
    arena = Arena(2, 100)
    for slot in (-1, 2):
        with pytest.raises(IndexError):
            arena.view(slot)
    with pytest.raises(IndexError):
        Arena(0, 100).view(0)
    with pytest.raises(ConfigError):
        Arena(-1, 100)


def test_memory_that_cannot_be_allocated_is_a_memory_error_and_the_rest_stays_usable() -> None:
    def one_slab(nbytes: int) -> torch.Tensor:
        if allocated:
            raise RuntimeError("out of memory")
        allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    allocated: list[int] = []
    arena = Arena(2, 4096, one_slab, slab_bytes=4096)
    arena.view(0).fill_(3)
    with pytest.raises(MemoryError, match="out of memory"):
        arena.view(1)
    assert int(arena.view(0)[0]) == 3
    with pytest.raises(MemoryError):
        anonymous(1 << 60)


def test_if_memory_cannot_be_pinned_pageable_memory_is_used_and_the_reason_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arenas, "why_not_pinned", lambda: "pinned allocation failed: WSL2")
    provider, reason = host_provider("auto")
    assert provider is anonymous
    assert "WSL2" in reason
    with pytest.raises(ConfigError, match="auto"):
        host_provider("always")
    assert host_provider("never")[0] is anonymous
    monkeypatch.setattr(arenas, "why_not_pinned", lambda: None)
    assert host_provider("auto")[0] is arenas.pinned


def test_reserved_memory_is_allocated_at_once_and_what_cannot_be_allocated_fails_when_used() -> None:
    requested: list[int] = []

    def provider(nbytes: int) -> torch.Tensor:
        requested.append(nbytes)
        if len(requested) > 2:
            raise RuntimeError("out of pinned memory")
        return torch.zeros(nbytes, dtype=torch.uint8)

    arena = Arena(5, 4096, provider, slab_bytes=4096, reserve=True)
    assert requested == [4096] * 3
    assert arena.view(1).shape == (4096,)
    with pytest.raises(MemoryError):
        arena.view(2)
