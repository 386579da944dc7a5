"""The disk tier: a folder of object files shared by any number of processes. See `folder` for names, `janitor` for capacity.

A write goes to a temporary file in the same folder, which is then renamed without replacing an existing file, so a reader
always sees a complete file. There is no state to lose: a killed process leaves at most a temporary file, which the janitor
removes.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from lmcache.errors import FormatError, FormatVersionError, TierError
from lmcache.format.file import verify_file
from lmcache.keys import ObjectId
from lmcache.observe.log import Throttle, info
from lmcache.plan import Status
from lmcache.tiers.base import Found, Read, Result, Write, refusal
from lmcache.tiers.durable import Durability
from lmcache.tiers.folder import (
    Passed,
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
from lmcache.tiers.owner import FolderRecord, cache_folder, check_folder, discard_foreign, make_private, user
from lmcache.tiers.rawio import Late, read_all, write_all
from lmcache.tiers.usage import Usage

# Non-blocking, because opening a foreign FIFO must not hang.
_OPEN_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OPEN_TEMP = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_MAX_SUSPECTS = 1 << 12
_RESERVE_TRIES = 8
_CLEAR_PASSES = 3
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 30.0


_CLEARED = Result(Status.CANCELLED, 0, "the folder was cleared after the object had been gathered")


class _ClearedError(Exception):
    """The namespace was cleared while an object of it was being written."""


class DiskTier:
    """Stores objects as files below `root`, a folder with one owner: files of other users are never read.

    Args:
        root: the folder; created if missing, readable by the owner only. If others may write to it, a folder in it, see
            `cache_folder`.
        capacity_bytes: limit on the size of the folder. It is recorded there: the one given last holds for all processes. None:
            the recorded one, or no limit if there is none.
        capacity_is_default: nobody chose `capacity_bytes`, so it is used only if none is recorded.
        timing: intervals of background work.
        log: receives failures of background work; failures of calls are in their results.

    Raises:
        TierError: `root` cannot be created or is not writable, belongs to another user, or can be written by one.
    """

    name = "disk"
    shared = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        *,
        capacity_is_default: bool = False,
        timing: Timing = Timing(),  # noqa: B008 (immutable)
        log: Throttle | None = None,
    ) -> None:
        self.root = Path(cache_folder(root))
        self._root = str(self.root)
        self._objects = os.path.join(self._root, "objects")
        self._timing = timing
        self._log = log or Throttle()
        self._tag = host_tag()
        self._lock = threading.Lock()
        if self.root != Path(os.path.abspath(os.path.expanduser(root))):
            info("disk-folder-own", path=self._root, reason=f"others may write to {os.fspath(root)}")
        self._durability = Durability(self._root, self._objects)
        self._suspects: dict[ObjectId, None] = {}
        self.foreign = 0
        """How often a file of another user was met instead of an object."""
        self._own_clears: deque[int] = deque(maxlen=1 << 10)
        self._pause = 0.0
        self._resume_at = 0.0
        self._closed = False
        self._uid = self._prepare()
        self._record = FolderRecord(self._root, self._uid, timing.tick, self._log)
        self._record.open(capacity_bytes, capacity_is_default)
        self._usage = Usage(os.path.join(self._root, "usage"))
        record = self._record
        self._janitor = Janitor(
            self._root, self._objects, self._uid, lambda: record.current().capacity, self._usage, timing, self._log
        )
        if not self._usage.known():
            with contextlib.suppress(OSError):
                self._janitor.collect()
        self._janitor.start()
        self._finalizer = weakref.finalize(self, _close, self._janitor, self._usage)
        _tiers.add(self)

    @property
    def _capacity(self) -> int | None:
        return self._record.current().capacity

    @property
    def capacity_bytes(self) -> int | None:
        """The most bytes the folder holds, for all processes; None: no limit."""
        return self._capacity

    @property
    def clear_epoch(self) -> int:
        """How often objects were cleared from the folder, by any process, as known at most a tick ago; no I/O."""
        return self._record.known.clear_epoch

    def cleared_since(self, epoch: int) -> tuple[int, list[bytes | None]]:
        """Returns `clear_epoch`, and the namespaces (None: all) that other processes cleared after `epoch`. No I/O."""
        record = self._record.known
        if record.clear_epoch == epoch:
            return epoch, []
        others = [clear.what for at, clear in record.clears_since(epoch).items() if at not in self._own_clears]
        return record.clear_epoch, [bytes.fromhex(what) if what else None for what in dict.fromkeys(others)]

    @property
    def usable_bytes(self) -> int | None:
        """Bytes that remain after the janitor has evicted; None: no limit."""
        capacity = self._capacity
        return None if capacity is None else int(LOW * capacity)

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
        """See `Tier.clear`. Nothing that any process had gathered before is published afterwards.

        Raises:
            TierError: some files could not be removed and may still be served.
        """
        if self._closed:
            raise TierError(f"{self._root}: the tier is closed")
        removed, passed = 0, Passed(self._uid)
        with contextlib.suppress(TierError):
            # Under the lock under which writers publish: each has published before, and its file is found below, or sees it.
            self._usage.add(0, commit=partial(self._record_clear, namespace))
        try:
            for _ in range(_CLEAR_PASSES):
                writing = False
                for entry in walk(self._objects, namespace, passed):
                    writing |= entry.temp
                    try:
                        size = None if entry.temp else entry.size  # its writer may just reserve its bytes
                        removed += self._usage.remove(entry.path, size) and not entry.temp
                    except OSError as error:
                        passed.errors.append(error)
                if not writing or passed.errors:
                    break  # otherwise one may have been published just now, if its writer did not get the lock
            prune(self._objects, math.inf)
        except OSError as error:
            passed.errors.append(error)
        if passed.errors:
            raise TierError(f"{self._root}: not everything could be removed: {passed.errors[0]}")
        return removed

    def _record_clear(self, namespace: bytes | None) -> None:
        record = self._record.update(lambda record: record.cleared(namespace))
        self._own_clears.append(record.clear_epoch)

    def scan(self) -> Iterator[Found]:
        """See `Tier.scan`. Reads names only; leaves out, with a log line, what cannot be listed."""
        passed = Passed(self._uid)
        try:
            for entry in walk(self._objects, passed=passed):
                if not entry.temp and entry.size and (id := object_of(entry)) is not None:
                    yield Found(id, entry.size)
        except OSError as error:
            passed.errors.append(error)
        if passed.errors:
            self._log.warning("disk-scan", path=self._root, detail=str(passed.errors[0]))

    def flush(self, *, durable: bool = False) -> None:
        """Returns at once: accepted writes are already published. With `durable`, returns once they survive a power loss.

        Notices what other processes have cleared until now.

        Raises:
            TierError: a sync failed, see `Durability.sync`.
        """
        self._record.latest()
        if durable:
            self._durability.sync()

    def note_present(self, id: ObjectId) -> None:
        """An object was found here instead of written: the next durable flush syncs it, for its writer may have been killed."""
        self._durability.note_file(self._path(id))

    def note_damaged(self, id: ObjectId) -> None:
        """Records that an object was read and found damaged. The next `delete` of it removes it only if it still is: another
        process may have replaced it by then.
        """
        with self._lock:
            if len(self._suspects) >= _MAX_SUSPECTS:
                del self._suspects[next(iter(self._suspects))]
            self._suspects[id] = None

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
        if self._is_foreign(status):
            return Result(Status.MISSING, 0, f"a file of {user(status.st_uid)}")
        return Result(Status.OK if stat.S_ISREG(status.st_mode) and status.st_size else Status.MISSING)

    def _is_foreign(self, status: os.stat_result) -> bool:
        """Returns whether another user owns a file, which is then never read. Counts and logs it."""
        if status.st_uid == self._uid:
            return False
        self.foreign += 1
        detail = f"a file of {user(status.st_uid)} is in place of an object; not read"
        self._log.warning("disk-foreign", path=self._root, detail=detail)
        return True

    def _read(self, read: Read, deadline: float | None) -> Result:
        try:
            fd = os.open(self._path(read.id), _OPEN_READ)
        except OSError as error:
            return _failed(error)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return Result(Status.MISSING, 0, "not a regular file")
            if self._is_foreign(status):
                return Result(Status.MISSING, 0, f"a file of {user(status.st_uid)}")
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
        capacity = self._capacity
        if capacity is not None and size > HIGH * capacity:
            return Result(Status.FULL, 0, f"{size} bytes do not fit into {capacity}")
        path = self._path(write.id)
        begun = time.monotonic() if write.begun is None else write.begun
        if self._record.is_cleared_since(begun, write.id.namespace):
            return _CLEARED
        try:
            if self._settled(path):
                self._durability.note_file(path)  # its writer may have been killed before it synced
                return Result(Status.OK)
        except OSError as error:
            return _failed(error)
        if time.monotonic() < self._resume_at:
            return Result(Status.FULL, 0, f"no space left on device; next try in ≤ {self._pause:g} s")
        self._janitor.start()
        try:
            return self._publish(path, write, begun, size, deadline)
        except _ClearedError:
            return _CLEARED
        except Late as late:
            return Result(Status.LATE, late.moved, "the deadline passed while writing")
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._back_off(error)
                return Result(Status.FULL, 0, str(error))
            return Result(Status.FAILED, 0, str(error))

    def _publish(self, path: str, write: Write, begun: float, size: int, deadline: float | None) -> Result:
        """Writes a temporary file and publishes it as `path`, unless the namespace was cleared after `begun`."""

        def commit() -> None:
            self._record.latest()
            if self._record.is_cleared_since(begun, write.id.namespace):
                raise _ClearedError
            publish(temp, path)

        temp = f"{os.path.dirname(path)}/{temp_name(self._tag)}"
        reserved = published = False
        fd = self._create(temp)
        try:
            try:
                reserved = self._reserve(fd, temp, size, deadline)
                if not reserved:
                    return Result(Status.FULL, 0, f"{self._capacity} bytes are in use and can't be freed fast enough")
                write_all(fd, write.parts, deadline)
            finally:
                os.close(fd)  # may raise: some filesystems report a full disk only on close
            try:
                self._usage.rename(size, commit)
            except FileExistsError:
                if self._settled(path):
                    self._durability.note_file(path)
                    return Result(Status.OK)  # another writer was faster
                self._usage.rename(size, commit)
            published = True
        finally:
            if not published:
                with contextlib.suppress(OSError):
                    self._usage.remove(temp, size if reserved else 0)
        self._note_success(path)
        return Result(Status.OK, size)

    def _reserve(self, fd: int, temp: str, size: int, deadline: float | None) -> bool:
        """Reserves `size` bytes of the capacity, evicting if necessary; retries, since others may take the freed space.

        The file gets its final size at the same time, so that a listing finds what is counted.
        """
        for _ in range(_RESERVE_TRIES):
            if self._usage.add(size, limit=self._capacity, commit=lambda: _grow(fd, temp, size)):
                return True
            if not self._janitor.make_room(size, deadline):
                return False
        return False

    def _note_success(self, path: str) -> None:
        with self._lock:
            if self._pause:
                info("disk-recovered", path=self._root)
            self._pause = 0.0
        self._durability.note_file(path)

    def _settled(self, path: str) -> bool:
        """Returns whether the object exists. Removes an empty file (content lost in a power failure) and a file of another user,
        so that it can be rewritten.

        Raises:
            OSError: the name is taken by something other than a file, or cannot be checked.
        """
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode):
            raise FileExistsError(errno.EEXIST, "something that is not an object has its name", path)
        foreign = self._is_foreign(status)
        if foreign or not status.st_size:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return status.st_size > 0 and not foreign

    def _create(self, temp: str) -> int:
        """Creates a temporary file and its folders, retrying if another process removes them at the same time."""
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):
                return self._open_temp(temp)
            with contextlib.suppress(FileNotFoundError):
                if not os.path.isdir(self._root):  # removed while we run
                    make_folders(self._root, self._root)
                    self._record.update(lambda record: record)
                make_folders(self._root, os.path.dirname(temp))
        return self._open_temp(temp)

    def _open_temp(self, temp: str) -> int:
        """Creates a temporary file, in folders of ours only."""
        shard = os.path.dirname(temp)
        for folder in (os.path.dirname(shard), shard):
            status = os.lstat(folder)
            if self._is_foreign(status):
                raise PermissionError(errno.EACCES, f"a folder of {user(status.st_uid)}; remove it", folder)
        return os.open(temp, _OPEN_TEMP, 0o600)

    def _back_off(self, error: OSError) -> None:
        """Handles a full device: suspends writes, twice as long each time, so that stores fail cheaply."""
        with self._lock:
            self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LAST_PAUSE)
            self._resume_at = time.monotonic() + self._pause
        self._log.warning("disk-full", path=self._root, detail=error.strerror)

    def _delete(self, id: ObjectId) -> Result:
        with self._lock:
            suspect = id in self._suspects
            self._suspects.pop(id, None)
        return self._delete_if_damaged(id) if suspect else self._unlink(id)

    def delete_damaged(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Removes objects unless they are whole by now; `nbytes` of the result is what was removed."""
        return [self._refusal(deadline) or self._delete_if_damaged(id) for id in ids]

    def _delete_if_damaged(self, id: ObjectId) -> Result:
        """Removes the file that was verified here and found damaged, never one that took its place."""
        path = self._path(id)
        before: os.stat_result | None = None
        try:
            before = os.stat(path, follow_symlinks=False)
            if stat.S_ISREG(before.st_mode) and not self._is_foreign(before):
                verify_file(path, id)
                return Result(Status.OK, 0, "kept: another process has replaced it with a good copy")
        except FormatVersionError as error:
            return Result(Status.OK, 0, f"kept: {error}")
        except FormatError:
            return self._unlink(id, before)
        except OSError as error:
            if error.errno in _ABSENT:
                return Result(Status.OK)
            return self._unlink(id, before)  # unreadable
        return self._unlink(id, before)

    def _unlink(self, id: ObjectId, expected: os.stat_result | None = None) -> Result:
        """Removes an object's file, if given only the `expected` one."""
        path = self._path(id)

        def remove() -> None:
            if expected is not None and _identity(os.stat(path, follow_symlinks=False)) != _identity(expected):
                raise FileNotFoundError(errno.ENOENT, "replaced", path)
            os.unlink(path)

        try:
            status = os.stat(path, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return Result(Status.OK)
            counted = 0 if self._is_foreign(status) else status.st_size
            self._usage.add(-counted, commit=remove)
            return Result(Status.OK, status.st_size)
        except OSError as error:
            if error.errno not in _ABSENT:
                return Result(Status.FAILED, 0, str(error))
        return Result(Status.OK)

    def _prepare(self) -> int:
        """Creates the folder, and checks its owner and that files can be written to it. Returns the user who owns our files: on
        some filesystems another one than this process's.
        """
        uid = os.geteuid()
        try:
            above = self._root
            while not os.path.lexists(above) and above != os.path.dirname(above):
                above = os.path.dirname(above)
                self._durability.note_folder(above)
            self._durability.note_folder(os.path.dirname(self._root))
            self._durability.note_folder(os.path.dirname(os.path.realpath(self._root)))
            make_folders(self._root, self._root)
            with _space_may_lack():
                uid = self._probe(self._root)
            if check_folder(self._root, uid):
                make_private(self._root)
            discard_foreign(self._root, uid)
            with _space_may_lack():
                make_folders(self._root, self._objects)
                self._probe(self._objects)
            check_folder(self._root, uid)
        except TierError:
            raise
        except OSError as error:
            if error.errno in _NO_SPACE:
                return uid
            raise TierError(
                f"the disk tier can't write to {self._root}: {error.strerror}; choose another folder (disk_path), "
                "make this one writable, or run without a disk tier"
            ) from error
        return uid

    def _probe(self, folder: str) -> int:
        """Creates and removes a file in `folder`; returns its owner."""
        try:
            temp = os.path.join(folder, temp_name(self._tag))
            fd = os.open(temp, _OPEN_TEMP, 0o600)
        except PermissionError:
            check_folder(self._root, os.geteuid())  # a better message, if the owner is the reason
            raise
        try:
            return os.fstat(fd).st_uid
        finally:
            os.close(fd)
            os.unlink(temp)


def _failed(error: OSError) -> Result:
    if error.errno in _ABSENT:
        return Result(Status.MISSING)
    return Result(Status.FAILED, 0, str(error))


@contextlib.contextmanager
def _space_may_lack() -> Iterator[None]:
    """Ignores a full device: not an error of the configuration, writes resume when there is space."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _grow(fd: int, path: str, size: int) -> None:
    """Gives a new file its final size. Raises `FileNotFoundError` if a clear has removed it: then its bytes do not count."""
    os.stat(path, follow_symlinks=False)
    os.ftruncate(fd, size)


def _close(janitor: Janitor, usage: Usage) -> None:
    janitor.close()
    usage.close()


_tiers: weakref.WeakSet[DiskTier] = weakref.WeakSet()


def _after_fork() -> None:
    """Resets all tiers in a forked child, which has no janitor thread, must not share file locks with its parent and may have
    inherited locked mutexes.
    """
    for tier in list(_tiers):
        tier._lock = threading.Lock()
        tier._durability.forked()
        tier._record.reset()
        tier._usage.reopen()
        tier._janitor.forked()


os.register_at_fork(after_in_child=_after_fork)
