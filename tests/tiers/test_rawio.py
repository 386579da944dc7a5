"""Short reads and writes, which real filesystems produce only rarely."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.tiers import rawio
from lmcache.tiers.base import Range
from lmcache.tiers.rawio import Late, read_all, write_all
from lmcache_conformance.labs.tier_objects import pattern


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the system calls with ones that transfer a random part of the request."""
    rng = random.Random(1)

    def shorten(call: Callable[..., int]) -> Callable[..., int]:
        def wrapper(fd: int, buffers: list[memoryview], at: int) -> int:
            some = rng.randint(1, sum(map(len, buffers)))
            cut = []
            for buffer in buffers:
                cut.append(buffer[:some])
                some -= len(cut[-1])
            return call(fd, [piece for piece in cut if len(piece)], at)

        return wrapper

    monkeypatch.setattr(os, "pwritev", shorten(os.pwritev))
    monkeypatch.setattr(os, "preadv", shorten(os.preadv))


@pytest.mark.parametrize("step", [16 << 20, 1000, 7])
def test_short_calls_are_continued_where_they_stopped(
    shm: Path, short_calls: None, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(rawio, "_STEP", step)
    parts = [pattern(i, size) for i, size in enumerate((100, 0, 3000, 1, 777, 2))]
    whole = b"".join(parts)
    with open(shm / "x", "wb") as file:
        assert write_all(file.fileno(), parts, None) == len(whole)
    assert (shm / "x").read_bytes() == whole
    buffers = [bytearray(size) for size in (50, 50, 1000, 4000)]
    ranges = [Range(0, 50), Range(50, 50), Range(200, 1000), Range(1200, 4000)]
    with open(shm / "x", "rb") as file:
        moved = read_all(file.fileno(), [memoryview(buffer) for buffer in buffers], ranges, None)
    assert moved == 1100 + len(whole) - 1200
    assert b"".join(buffers)[:1100] == whole[:100] + whole[200:1200]
    assert buffers[3] == whole[1200:] + bytes(4000 - len(whole) + 1200)


def test_a_deadline_is_noticed_between_calls(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rawio, "_STEP", 1000)
    clock = iter(range(100))
    monkeypatch.setattr(rawio.time, "monotonic", lambda: next(clock))
    with open(shm / "x", "w+b") as file:
        with pytest.raises(Late) as late:
            write_all(file.fileno(), [bytes(10_000)], 3.5)
        assert late.value.moved == 4000
        clock = iter(range(100))
        with pytest.raises(Late) as late:
            read_all(file.fileno(), [memoryview(bytearray(4000))], [Range(0, 4000)], 1.5)
        assert late.value.moved == 2000


def test_a_file_that_takes_no_more_bytes_is_an_error(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *args: 0)
    with open(shm / "x", "wb") as file, pytest.raises(OSError, match="no more bytes"):
        write_all(file.fileno(), [b"x"], None)


def test_views_of_wider_elements_are_written_as_bytes(shm: Path) -> None:
    view = memoryview(bytearray(pattern(1, 64))).cast("I").cast("B").cast("H", (4, 8))
    with open(shm / "x", "wb") as file:
        assert write_all(file.fileno(), [view], None) == 64
    assert (shm / "x").read_bytes() == pattern(1, 64)
