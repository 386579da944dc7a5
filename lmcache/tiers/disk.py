"""The disk tier: a folder of object files shared by any number of processes. See `folder` for names, `janitor` for capacity.

A write goes to a temporary file in the same folder, which is then renamed without replacing an existing file, so a reader
always sees a complete file. There is no state to lose: a killed process leaves at most a temporary file, which the janitor
removes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmcache.errors import TierError
from lmcache.keys import ObjectId
from lmcache.observe.log import Throttle, info
from lmcache.plan import Status
from lmcache.tiers.base import Found, Read, Result, Write, refusal
from lmcache.tiers.folder import (
    host_tag,
    make_folders,
    object_of,
    prune,
    publish,
    relative_path,
    temp_name,
    walk,
)
from lmcache.tiers.janitor import HIGH, LOW, Janitor, Timing
from lmcache.tiers.rawio import Late, read_all, write_all
from lmcache.tiers.usage import Usage

# Non-blocking, because opening a foreign FIFO must not hang.
_OPEN_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OPEN_TEMP = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_MAX_UNSYNCED = 1 << 16
_RESERVE_TRIES = 8
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 30.0


class DiskTier:
    """Stores objects as files below `root`.

    Args:
        root: the folder; created if missing, readable by the owner only.
        capacity_bytes: limit on the size of the folder, across all processes; None: no limit.
        timing: intervals of background work.
        log: receives failures of background work; failures of calls are in their results.

    Raises:
        TierError: `root` cannot be created or is not writable.
    """

    name = "disk"
    shared = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        *,
        timing: Timing = Timing(),  # noqa: B008 (immutable)
        log: Throttle | None = None,
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self._root = str(self.root)
        self._objects = os.path.join(self._root, "objects")
        self._capacity = capacity_bytes
        self._timing = timing
        self._log = log or Throttle()
        self._tag = host_tag()
        self._lock = threading.Lock()
        self._unsynced: dict[str, None] = {}
        self._sync_everything = False
        self._pause = 0.0
        self._resume_at = 0.0
        self._closed = False
        self._prepare()
        self._usage = Usage(os.path.join(self._root, "usage"))
        self._janitor = Janitor(self._root, self._objects, capacity_bytes, self._usage, timing, self._log)
        if not self._usage.known():
            with contextlib.suppress(OSError):
                self._janitor.collect()
        self._janitor.start()
        self._finalizer = weakref.finalize(self, _close, self._janitor, self._usage)
        os.register_at_fork(after_in_child=functools.partial(_after_fork, weakref.ref(self)))

    @property
    def capacity_bytes(self) -> int | None:
        """The most bytes the folder holds; None: no limit."""
        return self._capacity

    @property
    def usable_bytes(self) -> int | None:
        """Bytes that remain after the janitor has evicted; None: no limit."""
        return None if self._capacity is None else int(LOW * self._capacity)

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.contains`."""
        return [self._refusal(deadline) or self._contains(id) for id in ids]

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.read_into`."""
        return [self._refusal(deadline) or self._read(read, deadline) for read in reads]

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.write`."""
        return [self._refusal(deadline) or self._write(write, deadline) for write in writes]

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.delete`."""
        return [self._refusal(deadline) or self._delete(id) for id in ids]

    def clear(self, namespace: bytes | None = None) -> int:
        """See `Tier.clear`. Also cancels writes in progress in other processes: they are not published.

        Raises:
            TierError: some files could not be removed and may still be served.
        """
        if self._closed:
            raise TierError(f"{self._root}: the tier is closed")
        removed = 0
        try:
            for entry in walk(self._objects, namespace):
                removed += self._usage.remove(entry.path, entry.size) and not entry.temp
            prune(self._objects, math.inf)
        except OSError as error:
            raise TierError(f"{self._root}: not everything could be removed: {error}") from error
        return removed

    def scan(self) -> Iterator[Found]:
        """See `Tier.scan`. Reads names only; ends early, with a log line, if the folder cannot be listed."""
        try:
            for entry in walk(self._objects):
                if not entry.temp and entry.size and (id := object_of(entry)) is not None:
                    yield Found(id, entry.size)
        except OSError as error:
            self._log.warning("disk-scan", path=self._root, detail=str(error))

    def flush(self, *, durable: bool = False) -> None:
        """Returns at once: accepted writes are already published. With `durable`, first syncs this process's files and folders.

        Raises:
            TierError: a sync failed; the objects concerned may not survive a power loss.
        """
        if not durable:
            return
        with self._lock:
            paths, self._unsynced = self._unsynced, {}
            everything, self._sync_everything = self._sync_everything, False
        if everything:
            os.sync()
            return
        folders: dict[str, None] = {}
        failure: OSError | None = None
        for path in paths:
            folder = os.path.dirname(path)
            for above in (folder, os.path.dirname(folder), self._objects, self._root):
                folders[above] = None
        for path in (*paths, *folders):
            failure = _sync(path) or failure
        if failure is not None:
            raise TierError(f"{self._root}: not everything could be made durable: {failure}")

    def used_bytes(self) -> int:
        """See `Tier.used_bytes`. Includes the writes of all processes."""
        return 0 if self._closed else self._usage.read().used

    def close(self) -> None:
        """See `Tier.close`."""
        self._closed = True
        self._finalizer()

    # ---------------------------------------------------------------- one item each

    def _refusal(self, deadline: float | None) -> Result | None:
        return refusal(self._closed, deadline)

    def _path(self, id: ObjectId) -> str:
        return f"{self._objects}/{relative_path(id)}"

    def _contains(self, id: ObjectId) -> Result:
        try:
            status = os.stat(self._path(id), follow_symlinks=False)
        except OSError as error:
            return _failed(error)
        return Result(Status.OK if stat.S_ISREG(status.st_mode) and status.st_size else Status.MISSING)

    def _read(self, read: Read, deadline: float | None) -> Result:
        try:
            fd = os.open(self._path(read.id), _OPEN_READ)
        except OSError as error:
            return _failed(error)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return Result(Status.MISSING, 0, "not a regular file")
            if not status.st_size:
                return Result(Status.MISSING, 0, "an empty file")
            moved = read_all(fd, read.buffers, read.ranges, deadline)
            self._touch(fd, status)
            return Result(Status.OK, moved)
        except Late as late:
            return Result(Status.LATE, late.moved, "the deadline passed while reading")
        except OSError as error:
            return _failed(error)
        finally:
            os.close(fd)

    def _touch(self, fd: int, status: os.stat_result) -> None:
        """Records the use for the janitor, at most once per grain: many mounts (noatime, relatime) skip reads."""
        now = time.time()
        if max(status.st_atime, status.st_mtime) // self._timing.grain < now // self._timing.grain:
            with contextlib.suppress(OSError):
                os.utime(fd, ns=(int(now * 1e9), status.st_mtime_ns))

    def _write(self, write: Write, deadline: float | None) -> Result:
        size = sum(memoryview(part).nbytes for part in write.parts)
        if not size:
            return Result(Status.FAILED, 0, "an object has at least one byte")
        if self._capacity is not None and size > HIGH * self._capacity:
            return Result(Status.FULL, 0, f"{size} bytes do not fit into {self._capacity}")
        path = self._path(write.id)
        try:
            if self._settled(path):
                return Result(Status.OK)
        except OSError as error:
            return _failed(error)
        if time.monotonic() < self._resume_at:
            return Result(Status.FULL, 0, f"no space left on device; next try in ≤ {self._pause:g} s")
        self._janitor.start()
        try:
            return self._publish(path, write.parts, size, deadline)
        except Late as late:
            return Result(Status.LATE, late.moved, "the deadline passed while writing")
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._back_off(error)
                return Result(Status.FULL, 0, str(error))
            return Result(Status.FAILED, 0, str(error))

    def _publish(self, path: str, parts: Sequence[memoryview | bytes], size: int, deadline: float | None) -> Result:
        """Writes a temporary file and publishes it as `path`."""
        temp = f"{os.path.dirname(path)}/{temp_name(self._tag)}"
        reserved = published = False
        fd = self._create(temp)
        try:
            try:
                reserved = self._reserve(fd, size, deadline)
                if not reserved:
                    return Result(Status.FULL, 0, f"{self._capacity} bytes are in use and can't be freed fast enough")
                write_all(fd, parts, deadline)
            finally:
                os.close(fd)  # may raise: some filesystems report a full disk only on close
            try:
                self._usage.rename(size, lambda: publish(temp, path))
            except FileExistsError:
                if self._settled(path):
                    return Result(Status.OK)  # another writer was faster
                self._usage.rename(size, lambda: publish(temp, path))
            published = True
        finally:
            if not published:
                with contextlib.suppress(OSError):
                    self._usage.remove(temp, size if reserved else 0)
        self._note_success(path)
        return Result(Status.OK, size)

    def _reserve(self, fd: int, size: int, deadline: float | None) -> bool:
        """Reserves `size` bytes of the capacity, evicting if necessary; retries, since others may take the freed space.

        The file gets its final size at the same time, so that a listing finds what is counted.
        """
        for _ in range(_RESERVE_TRIES):
            if self._usage.add(size, limit=self._capacity, commit=lambda: os.ftruncate(fd, size)):
                return True
            if not self._janitor.make_room(size, deadline):
                return False
        return False

    def _note_success(self, path: str) -> None:
        with self._lock:
            if self._pause:
                info("disk-recovered", path=self._root)
            self._pause = 0.0
            if len(self._unsynced) < _MAX_UNSYNCED:
                self._unsynced[path] = None
            else:
                self._sync_everything = True

    def _settled(self, path: str) -> bool:
        """Returns whether the object exists. Removes an empty file (content lost in a power failure) so that it can be rewritten.

        Raises:
            OSError: the name is taken by something other than a file, or cannot be checked.
        """
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode):
            raise FileExistsError(errno.EEXIST, "something that is not an object has its name", path)
        if not status.st_size:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return status.st_size > 0

    def _create(self, temp: str) -> int:
        """Creates a temporary file and its folders, retrying if another process removes them at the same time."""
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):
                return os.open(temp, _OPEN_TEMP, 0o600)
            with contextlib.suppress(FileNotFoundError):
                make_folders(self._root, os.path.dirname(temp))
        return os.open(temp, _OPEN_TEMP, 0o600)

    def _back_off(self, error: OSError) -> None:
        """Handles a full device: suspends writes, twice as long each time, so that stores fail cheaply."""
        with self._lock:
            self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LAST_PAUSE)
            self._resume_at = time.monotonic() + self._pause
        self._log.warning("disk-full", path=self._root, detail=error.strerror)

    def _delete(self, id: ObjectId) -> Result:
        path = self._path(id)
        try:
            status = os.stat(path, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                self._usage.remove(path, status.st_size)
        except OSError as error:
            if error.errno not in _ABSENT:
                return Result(Status.FAILED, 0, str(error))
        return Result(Status.OK)

    def _prepare(self) -> None:
        """Creates the folder and checks that files can be written to it."""
        try:
            make_folders(self._root, self._objects)
            temp = os.path.join(self._root, temp_name(self._tag))
            os.close(os.open(temp, _OPEN_TEMP, 0o600))
            os.unlink(temp)
        except OSError as error:
            if error.errno in _NO_SPACE:
                return  # not an error of the configuration: writes resume when there is space
            raise TierError(
                f"the disk tier can't write to {self._root}: {error.strerror}; choose another folder (disk_path), "
                "make this one writable, or run without a disk tier"
            ) from error


def _failed(error: OSError) -> Result:
    if error.errno in _ABSENT:
        return Result(Status.MISSING)
    return Result(Status.FAILED, 0, str(error))


def _sync(path: str) -> OSError | None:
    """Calls fsync on `path`; a file that has been evicted needs none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _close(janitor: Janitor, usage: Usage) -> None:
    janitor.close()
    usage.close()


def _after_fork(reference: weakref.ref[DiskTier]) -> None:
    """Resets a tier in a forked child, which has no janitor thread, must not share file locks with its parent and may have
    inherited locked mutexes.
    """
    tier = reference()
    if tier is not None:
        tier._lock = threading.Lock()
        tier._usage.reopen()
        tier._janitor.forked()
