"""Reading and writing many buffers at file offsets with few system calls and no copies."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence

from lmcache.tiers.base import Range

_STEP = 16 << 20
"""Bytes per system call at most, so that a deadline is noticed in time."""

_PIECES = 1024
"""Buffers per system call: IOV_MAX of Linux."""


class Late(Exception):  # noqa: N818 (an outcome, not an error)
    """The deadline passed; `moved` bytes had been moved."""

    def __init__(self, moved: int) -> None:
        super().__init__(moved)
        self.moved = moved


def write_all(fd: int, parts: Sequence[memoryview | bytes], deadline: float | None) -> int:
    """Write `parts` one after another from offset 0 on; returns their length.

    Raises:
        Late, OSError
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
    """Fill `buffers[i]` from `ranges[i]`; returns the bytes read, fewer where a range passes the end of the file.

    Raises:
        Late, OSError
    """
    moved = 0
    for start, run in _runs(buffers, ranges):
        at = start
        for batch in _batches(run):
            while batch:
                _check(deadline, moved)
                step = os.preadv(fd, batch, at)
                if step <= 0:
                    break
                at += step
                moved += step
                batch = _rest(batch, step)
            if batch:
                break  # the end of the file
    return moved


def _check(deadline: float | None, moved: int) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise Late(moved)


def _runs(buffers: Sequence[memoryview], ranges: Sequence[Range]) -> Iterator[tuple[int, list[memoryview]]]:
    """Group ranges that follow each other in the file."""
    start, end, run = 0, -1, list[memoryview]()
    for buffer, (offset, length) in zip(buffers, ranges, strict=True):
        if buffer.nbytes != length:
            raise OSError(errno.EINVAL, f"a buffer of {buffer.nbytes} bytes for a range of {length}")
        if offset != end:
            if run:
                yield start, run
            start, run = offset, []
        run.append(buffer)
        end = offset + length
    if run:
        yield start, run


def _batches(parts: Sequence[memoryview | bytes]) -> Iterator[list[memoryview]]:
    """Cut into lists that fit one system call."""
    batch, size = list[memoryview](), 0
    for part in parts:
        view = memoryview(part)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        while len(view):
            piece = view[: _STEP - size]
            batch.append(piece)
            size += len(piece)
            view = view[len(piece) :]
            if size == _STEP or len(batch) == _PIECES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _rest(batch: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `batch` after its first `done` bytes."""
    for index, view in enumerate(batch):
        if done < len(view):
            return [view[done:], *batch[index + 1 :]]
        done -= len(view)
    return []
