"""How many bytes a folder holds, as all processes that write to it know it together.

A few 64-bit numbers in the file `<root>/usage`, changed under a file lock that is held for microseconds. It is advice, not
truth: a killed process leaves it slightly wrong, and the janitor corrects it from the folder's listing. Where the file can't
be used (read-only filesystem, no locks), the numbers are this process's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

_RECORD = struct.Struct("<8sqqq")
_MAGIC = b"lmcuse01"
_PATIENCE = 0.2
"""Seconds to wait for the lock: its holder may be a stopped process, and a slightly wrong number is better than a hang."""


class Count(NamedTuple):
    """What the record says, in bytes.

    Attributes:
        used: all objects, and writes under way.
        wanted: room that a writer found missing.
        moved: grows with each change in the folder, so that a listing can tell what it may have missed.
    """

    used: int = 0
    wanted: int = 0
    moved: int = 0


class Usage:
    """The counter of one folder. Thread-safe; several processes may share it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._mutex = threading.RLock()
        self._fd = -1
        self._own = Count()

    def add(self, delta: int, *, limit: int | None = None, commit: Callable[[], None] | None = None) -> bool:
        """Count `delta` bytes more, unless that makes it more than `limit`: then note the missing room and return False.

        `commit` makes the change in the folder. It runs under the lock, so that no listing begins or ends between the change
        and its being counted: else a janitor would take the difference for an error and correct it.

        Raises:
            OSError: `commit` did; nothing was counted.
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

    def remove(self, path: str, nbytes: int) -> bool:
        """Unlink a counted file; False if it is gone already, and then no longer counted."""
        try:
            return self.add(-nbytes, commit=lambda: os.unlink(path))
        except FileNotFoundError:
            return False

    def rename(self, nbytes: int, commit: Callable[[], None]) -> None:
        """Let `commit` give a counted file another name. A listing under way may meet it twice, or not at all.

        Raises:
            OSError: `commit` did.
        """

        def change(now: Count) -> Count:
            commit()
            return now._replace(moved=now.moved + nbytes)

        self._update(change)

    def read(self) -> Count:
        """The numbers now."""
        return self._update(lambda now: now)

    def correct(self, before: Count, listed: int) -> Count:
        """Believe a listing that found `listed` bytes, as far as it is not explained by what moved since `before` was read.
        Room is no longer wanted: whoever still waits says so again.
        """

        def change(now: Count) -> Count:
            explained = abs(listed - now.used) <= now.moved - before.moved
            return Count(now.used if explained else listed, 0, now.moved)

        return self._update(change)

    def known(self) -> bool:
        """Whether an earlier process left a count."""
        with self._mutex, contextlib.suppress(OSError):
            return _unpack(os.pread(self._open(), _RECORD.size, 0)) is not None
        return False

    def stale(self) -> bool:
        """Whether the open file is no longer the one of that name (the folder was removed or moved): then `close` it."""
        with self._mutex:
            return self._fd >= 0 and not same_file(self._fd, self._path)

    def reopen(self) -> None:
        """Forget the open file and its lock. For a forked child: the lock would be shared with its parent."""
        self._mutex = threading.RLock()
        self.close()

    def close(self) -> None:
        """Release the file; it is opened again when needed."""
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        if self._fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, 0o600)
        return self._fd

    def _update(self, change: Callable[[Count], Count]) -> Count:
        """Call `change` once, with what is recorded, and record what it returns. What it raises is passed on."""
        with self._mutex, contextlib.ExitStack() as stack:
            fd, now = -1, self._own
            with contextlib.suppress(OSError):  # else only this process knows
                fd = self._open()
                if _lock(fd):
                    stack.callback(_unlock, fd)
                now = _unpack(os.pread(fd, _RECORD.size, 0)) or Count()
            self._own = change(now)
            if fd >= 0 and self._own != now:
                with contextlib.suppress(OSError):  # the janitor will correct it
                    os.pwrite(fd, _RECORD.pack(_MAGIC, *self._own), 0)
            return self._own


def same_file(fd: int, path: str) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _unpack(data: bytes) -> Count | None:
    if len(data) != _RECORD.size:
        return None
    magic, *numbers = _RECORD.unpack(data)
    return Count(*numbers) if magic == _MAGIC and min(numbers) >= 0 else None


def _lock(fd: int) -> bool:
    """Lock, or give up after a while."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.0005)
    return False


def _unlock(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
