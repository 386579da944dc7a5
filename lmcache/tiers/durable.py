"""Makes a disk tier's files survive a power loss: which of them have not been synced yet, and syncing them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import threading
from typing import Any

from lmcache.errors import TierError

_UNSYNCABLE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_LOST_ON_SYNC = {errno.EIO, errno.ENOSPC, errno.EDQUOT}
_BLOCK = 1 << 20
_MAX_UNSYNCED = 1 << 16


class Durability:
    """What of a folder has to be synced. Thread-safe.

    Args:
        root: the folder.
        objects: the folder `objects` in it.
    """

    def __init__(self, root: str, objects: str) -> None:
        self._root = root
        self._objects = objects
        self._new_folders: dict[str, None] = {}
        self._unsynced: dict[str, bool] = {}  # path → a sync failed: the data may have left the page cache unwritten
        self.forked()

    def forked(self) -> None:
        """Replaces the locks, for a forked child."""
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()

    def note_file(self, path: str) -> None:
        """A file was published, or found published by somebody who may have been killed before syncing it."""
        with self._lock:
            if len(self._unsynced) < _MAX_UNSYNCED:  # beyond that, syncing the filesystem has to do
                self._unsynced.setdefault(path, False)

    def note_folder(self, path: str) -> None:
        """An entry may have been made in a folder at or above the root."""
        self._new_folders[path] = None

    def sync(self) -> None:
        """Syncs the files noted, their folders, and then the filesystem, for objects that other processes published.

        A concurrent call waits for the one under way; the next one tries again what could not be synced.

        Raises:
            TierError: a sync failed; the objects concerned may not survive a power loss.
        """
        with self._sync_lock:
            failures: list[OSError] = []
            folders: dict[str, None] = {}
            with self._lock:
                paths, ancestors = [*self._unsynced], [*self._new_folders]
            for path in paths:
                folder = os.path.dirname(path)
                for above in (folder, os.path.dirname(folder), self._objects, self._root):
                    folders[above] = None
            if paths:
                folders |= dict.fromkeys(ancestors)
            for path in paths:
                failures += self._sync_file(path)
            for path in folders:
                # Some filesystems cannot sync folders, and the parent of the root may be unreadable: then see below.
                excused = {*_UNSYNCABLE, errno.EACCES, errno.EPERM, errno.EROFS} if path in ancestors else _UNSYNCABLE
                if (error := _sync(path, follow=True)) and error.errno not in excused:
                    failures.append(error)
            if error := _sync_filesystem(self._root):
                failures.append(error)
            with self._lock:
                if failures:
                    for path in paths:  # their folders may be what was not synced
                        self._unsynced.setdefault(path, False)
                else:
                    for path in folders:
                        self._new_folders.pop(path, None)
        if failures:
            raise TierError(f"{self._root}: not everything could be made durable: {failures[0]}; call flush again")

    def _sync_file(self, path: str) -> list[OSError]:
        """Syncs one file of `_unsynced`; it stays there if that fails or is interrupted.

        After a failed fsync the kernel regards the pages as clean, and a second fsync succeeds without writing them: then the
        bytes are written again, the same ones, before the file is synced.
        """
        with self._lock:
            failed = self._unsynced.pop(path, False)
        error: OSError | None = None
        done = False
        try:
            error = (_write_again(path) if failed else None) or _sync(path)
            done = error is None
        finally:
            if not done:
                with self._lock:
                    self._unsynced[path] = failed or (error is not None and error.errno in _LOST_ON_SYNC)
        return [] if error is None else [error]


def _write_again(path: str) -> OSError | None:
    """Writes a file's bytes once more in place, so that the kernel writes them to the device again."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            at = 0
            while data := os.pread(fd, _BLOCK, at):
                at += os.pwrite(fd, data, at)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


@functools.cache
def _syncfs() -> Any:
    """Returns the C function `syncfs`, or None where there is none."""
    with contextlib.suppress(OSError):
        return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    return None


def _sync_filesystem(root: str) -> OSError | None:
    """Syncs the filesystem that holds `root`: everything that any process wrote to it."""
    call = _syncfs()
    try:
        fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    try:
        if call is not None:
            if call(fd) == 0:
                return None
            code = ctypes.get_errno()
            if code not in (errno.ENOSYS, errno.EPERM):
                return OSError(code, os.strerror(code), root)
    finally:
        os.close(fd)
    os.sync()
    return None


def _sync(path: str, *, follow: bool = False) -> OSError | None:
    """Calls fsync on `path`; a file that has been evicted needs none. `follow`: `path` may be a link (a root is)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None
