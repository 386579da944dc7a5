"""Vectored file I/O: reads and writes many buffers at file offsets with few system calls and no copies."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence

from lmcache.tiers.base import Range

_STEP = 16 << 20
"""Most bytes per system call, so that the deadline is checked often enough."""

_MAX_BUFFERS = 1024
"""Most buffers per system call: `IOV_MAX` on Linux."""


class Late(Exception):  # noqa: N818 (an outcome, not an error)
    """The deadline passed after `moved` bytes had been transferred."""

    def __init__(self, moved: int) -> None:
        super().__init__(moved)
        self.moved = moved


def write_all(fd: int, parts: Sequence[memoryview | bytes], deadline: float | None) -> int:
    """Writes `parts` one after another starting at offset 0; returns their total length.

    Raises:
        Late: the deadline passed.
        OSError: a write failed.
    """
    at = 0
    for batch in _batches(parts):
        while batch:
            _check(deadline, at)
            step = os.pwritev(fd, batch, at)
            if step <= 0:
                raise OSError(errno.EIO, "the file takes no more bytes")
            at += step
            batch = _rest(batch, step)
    return at


def read_all(fd: int, buffers: Sequence[memoryview], ranges: Sequence[Range], deadline: float | None) -> int:
    """Fills `buffers[i]` from `ranges[i]`; returns the bytes read, fewer where a range extends past the end of the file.

    Raises:
        Late: the deadline passed.
        OSError: a read failed.
    """
    moved = 0
    for start, group in _adjacent(buffers, ranges):
        at = start
        for batch in _batches(group):
            while batch:
                _check(deadline, moved)
                step = os.preadv(fd, batch, at)
                if step <= 0:
                    break
                at += step
                moved += step
                batch = _rest(batch, step)
            if batch:
                break  # end of file
    return moved


def _check(deadline: float | None, moved: int) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise Late(moved)


def _adjacent(buffers: Sequence[memoryview], ranges: Sequence[Range]) -> Iterator[tuple[int, list[memoryview]]]:
    """Groups ranges that are adjacent in the file: yields (offset, buffers)."""
    start, end, group = 0, -1, list[memoryview]()
    for buffer, (offset, length) in zip(buffers, ranges, strict=True):
        if buffer.nbytes != length:
            raise OSError(errno.EINVAL, f"a buffer of {buffer.nbytes} bytes for a range of {length}")
        if offset != end:
            if group:
                yield start, group
            start, group = offset, []
        group.append(buffer)
        end = offset + length
    if group:
        yield start, group


def _batches(parts: Sequence[memoryview | bytes]) -> Iterator[list[memoryview]]:
    """Splits `parts` into lists that fit one system call."""
    batch, size = list[memoryview](), 0
    for part in parts:
        view = memoryview(part)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        while len(view):
            part_view = view[: _STEP - size]
            batch.append(part_view)
            size += len(part_view)
            view = view[len(part_view) :]
            if size == _STEP or len(batch) == _MAX_BUFFERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _rest(batch: list[memoryview], done: int) -> list[memoryview]:
    """Returns what remains of `batch` after its first `done` bytes."""
    for index, view in enumerate(batch):
        if done < len(view):
            return [view[done:], *batch[index + 1 :]]
        done -= len(view)
    return []
