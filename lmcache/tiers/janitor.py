"""Keeps a disk tier's folder within its capacity, on behalf of all processes that write to it.

Every process with a disk tier runs a janitor thread. Only the holder of the lock on `<root>/janitor.lock` works; the others
take over when it exits. The holder periodically lists the folder, corrects the shared byte count, removes temporary files of
killed processes, and evicts: least recently used first and, among objects used at about the same time, the deepest chunks
first, because a chunk is useless without the chunks before it. Files of other users are passed by and do not count.

The holder writes a heartbeat into the lock file. If that ages beyond the lease (the process is stopped, its thread or its
filesystem hangs), another process replaces the file and takes over; the former holder notices that the file is not its own.
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

from lmcache.observe.log import Throttle
from lmcache.tiers.folder import Entry, Passed, depth_of, host_tag, is_stale, prune, temp_name, unlink, walk
from lmcache.tiers.usage import Usage, same_file

HIGH, LOW = 0.95, 0.90
"""Evict when more than HIGH of the capacity is used, down to LOW: writers need headroom while a pass is in progress."""

_CLOSE_WAIT_S = 5.0
"""Seconds that `close` waits for a pass in progress."""


_BEAT = struct.Struct("<8s16sqdd")
_BEAT_MAGIC = b"lmcjan01"
_CLOCK_TOLERANCE_S = 300.0
"""Seconds by which the wall clocks of two hosts may differ."""


class Timing(NamedTuple):
    """Intervals and timeouts, in seconds.

    Attributes:
        tick: how often the holder checks the shared count, and the others try to take the lock.
        rescan: how often the folder is listed without another reason (listing takes at most 2 % of the time).
        temp_age: age at which temporary files of unknown processes are removed.
        grain: resolution of use times; uses within one grain count as simultaneous.
        patience: how long a writer waits for another process's janitor to free space.
        lease: age of the holder's heartbeat at which another process takes over.
    """

    tick: float = 0.25
    rescan: float = 60.0
    temp_age: float = 600.0
    grain: float = 60.0
    patience: float = 0.5
    lease: float = 20.0


class Janitor:
    """This process's janitor of one folder.

    Args:
        root: the folder.
        objects: the folder `objects` in it.
        uid: the user whose files are ours.
        capacity: returns the limit in bytes; None: no limit, so the janitor only counts and cleans up.
        usage: the count of bytes.
        timing: intervals and timeouts.
        log: receives failures.
    """

    def __init__(
        self,
        root: str,
        objects: str,
        uid: int,
        capacity: Callable[[], int | None],
        usage: Usage,
        timing: Timing,
        log: Throttle,
    ) -> None:
        self._root = root
        self._lock_path = os.path.join(root, "janitor.lock")
        self._objects = objects
        self._uid = uid
        self._limit = capacity
        self._usage = usage
        self._timing = timing
        self._log = log
        self._tag = host_tag()
        self._closed = False
        self._fd = -1
        self.evicted = 0
        """Objects evicted by this process."""
        self.foreign = 0
        """Files and folders of other users that the last pass found."""
        self.forked()

    def forked(self) -> None:
        """Resets the state in a forked child: no thread is running, and the lock belongs to the parent."""
        self._mutex = threading.RLock()  # guards passes and the lock file; reentrant: `close` may run in a finalizer
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_scan = 0.0
        self._beaten = -float("inf")
        self._seen: tuple[bytes, float] | None = None  # the other holder's heartbeat, and when it was first seen
        if self._fd >= 0:
            os.close(self._fd)  # closing does not unlock: the parent still has it open
        self._fd = -1

    def start(self) -> None:
        """Starts the background thread unless it is running."""
        if self._thread is None or not self._thread.is_alive():
            with self._mutex:
                if not self._closed and (self._thread is None or not self._thread.is_alive()):
                    self._thread = threading.Thread(target=self._run, name="lmcache-janitor", daemon=True)
                    self._thread.start()

    @property
    def holds_lock(self) -> bool:
        """Whether this process holds the lock and therefore does the work."""
        return self._fd >= 0

    def make_room(self, need: int, deadline: float | None) -> bool:
        """Tries to free `need` bytes; True: there was room on return. Blocks while another process's janitor is working."""
        if (capacity := self._limit()) is None or need > capacity:
            return False
        until = time.monotonic() + self._timing.patience
        if deadline is not None:
            until = min(until, deadline)
        while not self._closed:
            if self._mutex.acquire(timeout=max(0.0, until - time.monotonic())):
                try:
                    if self._is_short_of(need) and self._acquire():  # otherwise another thread has freed the space
                        self._collect(need)
                except OSError as error:
                    self._log.warning("disk-janitor", path=self._objects, detail=str(error))
                finally:
                    self._mutex.release()
            if not self._is_short_of(need):
                return True
            if self.holds_lock or time.monotonic() >= until:
                return False
            time.sleep(min(0.01, self._timing.tick))
        return False

    def collect(self) -> bool:
        """Runs one pass now if this process holds or gets the lock; otherwise returns False."""
        with self._mutex:
            if not self._acquire():
                return False
            self._collect(0)
            return True

    def close(self) -> None:
        """Stops the thread and releases the lock. Idempotent. Waits a bounded time, since a filesystem may hang."""
        self._closed = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_WAIT_S)
        if self._mutex.acquire(timeout=_CLOSE_WAIT_S):
            self._release()
            self._mutex.release()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._limit()  # reads what other processes have agreed on meanwhile, whoever holds the lock
                with self._mutex:
                    if not self._closed and self._acquire():
                        self._beat()
                        if self._is_due():
                            self._collect(0)
            except Exception as error:
                self._log.warning("disk-janitor", path=self._objects, detail=str(error) or type(error).__name__)
            self._wake.wait(self._timing.tick)

    def _is_short_of(self, need: int) -> bool:
        capacity = self._limit()
        return capacity is not None and self._usage.read().used + need > capacity

    def _is_due(self) -> bool:
        if time.monotonic() >= self._next_scan:
            return True
        now, capacity = self._usage.read(), self._limit()
        if self._usage.damaged:
            return True
        return capacity is not None and (now.used > HIGH * capacity or now.used + now.wanted > capacity)

    def _acquire(self) -> bool:
        """Takes the lock, or checks that we still hold it. The mutex must be held."""
        if self._usage.stale():
            self._usage.close()
        if self._fd >= 0:
            if same_file(self._fd, self._lock_path):
                return True
            self._release()  # the folder was replaced: another process may hold the lock of the new one
        try:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                expired = self._has_expired(fd)
            finally:
                os.close(fd)
            if not expired:
                return False
            fd = self._replace_lock()
        except OSError:
            pass  # no locks on this filesystem: several janitors are harmless, they only evict slightly early
        self._fd = fd
        self._seen = None
        self._next_scan = 0.0
        self._beaten = -float("inf")
        self._beat()
        return True

    def _beat(self) -> None:
        """Renews the lease, if a fifth of it has passed. The lock must be held."""
        now = time.monotonic()
        if self._fd >= 0 and now - self._beaten >= self._timing.lease / 5:
            self._beaten = now
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, _BEAT.pack(_BEAT_MAGIC, self._tag.encode(), os.getpid(), now, time.time()), 0)

    def _has_expired(self, fd: int) -> bool:
        """Returns whether the process that holds the lock of this file has not renewed its lease.

        On the same host the monotonic clock decides; the wall clocks of two hosts may differ. A heartbeat that stays the same
        for a whole lease, while we watch, has ended on any clock.
        """
        data, now = os.pread(fd, _BEAT.size, 0), time.monotonic()
        if self._seen is None or self._seen[0] != data:
            self._seen = (data, now)
        if now - self._seen[1] > self._timing.lease:
            return True
        if len(data) != _BEAT.size:
            return False  # just taken, or by a release without heartbeats
        magic, tag, _, monotonic, wall = _BEAT.unpack(data)
        if magic != _BEAT_MAGIC:
            return False
        if tag == self._tag.encode():
            return bool(now - monotonic > self._timing.lease)
        return bool(time.time() - wall > self._timing.lease + _CLOCK_TOLERANCE_S)

    def _replace_lock(self) -> int:
        """Puts a lock file of ours, locked, in place of one whose holder's lease has expired. Returns the open file."""
        temp = os.path.join(self._root, temp_name(self._tag))
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(temp, self._lock_path)
        except OSError:
            os.close(fd)
            unlink(temp)
            raise
        self._log.warning("disk-janitor-replaced", path=self._lock_path, detail="its holder stopped renewing the lease")
        return fd

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _collect(self, need: int) -> None:
        """Runs one pass: list, clean up, correct the count, evict. Mutex and lock must be held."""
        begun = time.monotonic()
        before = self._usage.read()
        entries: list[Entry] = []
        passed = Passed(self._uid)
        counted, now = 0, time.time()
        for number, entry in enumerate(walk(self._objects, passed=passed)):
            if self._closed:
                return
            if not number % 256:
                self._beat()
            if entry.used > now + self._timing.grain:
                entry = entry._replace(used=self._rejuvenate(entry.path, now))
            if entry.temp:
                if is_stale(entry, self._tag, now, self._timing.temp_age):
                    self._remove(lambda path=entry.path: unlink(path))  # type: ignore[misc]
                else:
                    counted += entry.size
            else:
                counted += entry.size
                entries.append(entry)
        if begun >= self._next_scan:
            prune(self._objects, now - self._timing.temp_age)
        self._report(passed)
        if passed.errors:  # what could not be listed is still there: then a listing does not lower the count
            counted = max(counted, before.used)
        used = self._usage.correct(before, counted).used
        if (capacity := self._limit()) is not None:
            need = max(need, before.wanted if before.wanted <= capacity else 0)
            if used > HIGH * capacity or used + need > capacity:
                self._evict(entries, used - max(0, min(int(LOW * capacity), capacity - need)))
        self._next_scan = begun + max(self._timing.rescan, 50 * (time.monotonic() - begun))

    def _evict(self, entries: list[Entry], excess: int) -> None:
        """Evicts objects of at least `excess` bytes in total, in the order given in the module's docstring."""
        grain = self._timing.grain
        entries.sort(key=lambda entry: (entry.used // grain, -depth_of(entry.name)))
        for number, entry in enumerate(entries):
            if excess <= 0:
                break
            if not number % 256:
                self._beat()
            if self._remove(lambda entry=entry: self._usage.remove(entry.path, entry.size)):  # type: ignore[misc]
                self.evicted += 1
                excess -= entry.size

    def _remove(self, remove: Callable[[], bool]) -> bool:
        """Calls `remove`; a file that cannot be removed does not keep the others."""
        try:
            return remove()
        except OSError as error:
            self._log.warning("disk-janitor", path=self._objects, detail=f"cannot remove: {error}")
            return False

    def _rejuvenate(self, path: str, now: float) -> float:
        """Sets the times of a file that lie in the future (a wrong clock) to `now`, so that it ages from here. Returns its age's
        start; a file that cannot be changed counts as the oldest.
        """
        try:
            os.utime(path, (now, now), follow_symlinks=False)
        except OSError:
            return 0.0
        return now

    def _report(self, passed: Passed) -> None:
        self.foreign = passed.foreign
        if passed.foreign:
            detail = "of other users: not served, not counted and not removed"
            self._log.warning("disk-foreign", path=self._objects, found=passed.foreign, detail=detail)
        if passed.errors:
            detail = f"{len(passed.errors)} folders cannot be listed, e.g. {passed.errors[0]}"
            self._log.warning("disk-janitor", path=self._objects, detail=detail)
