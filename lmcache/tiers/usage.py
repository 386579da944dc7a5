"""Counts the bytes in a disk tier's folder, shared by all processes that write to it.

The count is a few 64-bit integers in the file `<root>/usage`, updated under a file lock that is held for microseconds. It is
an estimate: a killed process leaves it slightly wrong, and the janitor corrects it from a listing of the folder. Where the
file cannot be used (read-only filesystem, no locks), each process keeps its own count.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

_RECORD = struct.Struct("<8sqqq")
_MAGIC = b"lmcuse01"
_MOST = 1 << 60
"""Numbers above this (an exabyte) are damage."""

_LOCK_WAIT_S = 0.2
"""Seconds to wait for the lock. Its holder may be a stopped process; a slightly wrong count is better than a hang."""


class Count(NamedTuple):
    """The contents of the usage file, in bytes.

    Attributes:
        used: size of all objects and of writes in progress.
        wanted: free space that a writer needed and did not get.
        moved: sum of the sizes of all changes in the folder, ever; bounds what a listing in progress may have missed.
    """

    used: int = 0
    wanted: int = 0
    moved: int = 0


class Usage:
    """The byte count of one folder. Thread-safe and shared between processes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._mutex = threading.RLock()
        self._fd = -1
        self._own = Count()
        self._damaged = False

    def add(self, delta: int, *, limit: int | None = None, commit: Callable[[], None] | None = None) -> bool:
        """Adds `delta` bytes to the count. If that exceeds `limit`, records the missing space instead and returns False.

        `commit` makes the change in the folder. It runs under the lock, so that no listing begins or ends between the change
        and its count; otherwise a janitor would treat the difference as an error and "correct" it.

        Raises:
            OSError: raised by `commit`; nothing was counted.
        """

        fits = True

        def change(now: Count) -> Count:
            nonlocal fits
            fits = limit is None or now.used + delta <= limit
            if not fits:
                return now._replace(wanted=max(now.wanted, delta))
            if commit is not None:
                commit()
            return Count(max(0, now.used + delta), now.wanted, now.moved + abs(delta))

        self._update(change)
        return fits

    def remove(self, path: str, nbytes: int | None) -> bool:
        """Unlinks a counted file and subtracts its size. Returns False, and changes nothing, if the file is already gone.

        `nbytes`: its size, None if it may be growing: then the size that it has under the lock counts.
        """

        def change(now: Count) -> Count:
            size = os.stat(path, follow_symlinks=False).st_size if nbytes is None else nbytes
            os.unlink(path)
            return Count(max(0, now.used - size), now.wanted, now.moved + size)

        try:
            self._update(change)
        except FileNotFoundError:
            return False
        return True

    def rename(self, nbytes: int, commit: Callable[[], None]) -> None:
        """Renames a counted file by calling `commit`. A listing in progress may include the file twice, or not at all.

        Raises:
            OSError: raised by `commit`.
        """

        def change(now: Count) -> Count:
            commit()
            return now._replace(moved=now.moved + nbytes)

        self._update(change)

    def read(self) -> Count:
        """Returns the current count."""
        return self._update(lambda now: now)

    def correct(self, before: Count, listed: int) -> Count:
        """Sets the count to the `listed` bytes of a listing, unless the changes since `before` explain the difference.

        `before` is the count read before the listing began. Also resets `wanted`: a writer that still waits sets it again.
        """

        def change(now: Count) -> Count:
            explained = abs(listed - now.used) <= now.moved - before.moved
            return Count(now.used if explained and not damaged else listed, 0, now.moved)

        damaged, self._damaged = self._damaged, False
        corrected = self._update(change, repair=True)
        self._damaged = False
        return corrected

    @property
    def damaged(self) -> bool:
        """Whether the file was found damaged or removed since the last `correct`: the count is a guess until then."""
        return self._damaged

    def known(self) -> bool:
        """Returns whether an earlier process left a valid count."""
        with self._mutex, contextlib.suppress(OSError):
            return _unpack(os.pread(self._open(), _RECORD.size, 0)) is not None
        return False

    def stale(self) -> bool:
        """Returns whether the path no longer names the open file (the folder was removed or moved); if so, call `close`."""
        with self._mutex:
            return self._fd >= 0 and not same_file(self._fd, self._path)

    def reopen(self) -> None:
        """Drops the open file and its lock. For a forked child, which would otherwise share the lock with its parent."""
        self._mutex = threading.RLock()
        self.close()

    def close(self) -> None:
        """Closes the file; the next use reopens it."""
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        if self._fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self._path, flags, 0o600)
            if os.fstat(fd).st_nlink > 1:
                os.close(fd)
                raise OSError(errno.EMLINK, "a file with several names is not written to", self._path)
            self._fd = fd
        return self._fd

    def _update(self, change: Callable[[Count], Count], *, repair: bool = False) -> Count:
        """Calls `change` once with the recorded count and records what it returns. Exceptions of `change` propagate.

        A damaged record is left as it is without `repair`, so that the janitor, in whichever process, finds it; until then each
        process continues with the count it had.
        """
        with self._mutex, contextlib.ExitStack() as stack:
            fd, now, new, found = -1, self._own, False, None
            with contextlib.suppress(OSError):  # otherwise the count is this process's own
                fd = self._open()
                if _lock(fd):
                    stack.callback(_unlock, fd)
                data = os.pread(fd, _RECORD.size, 0)
                found = _unpack(data)
                if found is None:
                    new = not data
                    self._damaged = self._damaged or not new or self._own != Count()  # not if nobody has counted yet
                now = self._own if found is None else found
            self._own = _bounded(change(now))
            if fd >= 0 and (found is not None or new or repair) and (self._own != found):
                with contextlib.suppress(OSError):  # the janitor will correct it
                    os.pwrite(fd, _RECORD.pack(_MAGIC, *self._own), 0)
            return self._own


def same_file(fd: int, path: str) -> bool:
    """Returns whether `path` still names the open file `fd`."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _unpack(data: bytes) -> Count | None:
    if len(data) != _RECORD.size:
        return None
    magic, *numbers = _RECORD.unpack(data)
    return Count(*numbers) if magic == _MAGIC and min(numbers) >= 0 and max(numbers) <= _MOST else None


def _bounded(count: Count) -> Count:
    """Returns a count that `_unpack` accepts. `moved` starts again from 0 rather than overflow: one listing is then corrected."""
    used, wanted, moved = count
    return Count(min(max(0, used), _MOST), min(max(0, wanted), _MOST), moved if 0 <= moved <= _MOST else 0)


@contextlib.contextmanager
def locked(fd: int) -> Iterator[bool]:
    """Holds the lock of an open file while the block runs; yields False if it was not free soon enough and is not held."""
    got = False
    with contextlib.suppress(OSError):
        got = _lock(fd)
    try:
        yield got
    finally:
        if got:
            _unlock(fd)


def _lock(fd: int) -> bool:
    """Takes the file lock; returns False if it is not free within `_LOCK_WAIT_S`."""
    until = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.0005)
    return False


def _unlock(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
