"""Keeps a disk tier's folder within its capacity, on behalf of all processes that write to it.

Every process with a disk tier runs a janitor thread. Only the holder of the lock on `<root>/janitor.lock` works; the others
take over when it exits. The holder periodically lists the folder, corrects the shared byte count, removes temporary files of
killed processes, and evicts: least recently used first and, among objects used at about the same time, the deepest chunks
first, because a chunk is useless without the chunks before it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from typing import NamedTuple

from lmcache.observe.log import Throttle
from lmcache.tiers.folder import Entry, depth_of, host_tag, is_stale, prune, unlink, walk
from lmcache.tiers.usage import Usage, same_file

HIGH, LOW = 0.95, 0.90
"""Evict when more than HIGH of the capacity is used, down to LOW: writers need headroom while a pass is in progress."""

_CLOSE_WAIT_S = 5.0
"""Seconds that `close` waits for a pass in progress."""


class Timing(NamedTuple):
    """Intervals and timeouts, in seconds.

    Attributes:
        tick: how often the holder checks the shared count, and the others try to take the lock.
        rescan: how often the folder is listed without another reason (listing takes at most 2 % of the time).
        temp_age: age at which temporary files of unknown processes are removed.
        grain: resolution of use times; uses within one grain count as simultaneous.
        patience: how long a writer waits for another process's janitor to free space.
    """

    tick: float = 0.25
    rescan: float = 60.0
    temp_age: float = 600.0
    grain: float = 60.0
    patience: float = 0.5


class Janitor:
    """This process's janitor of one folder. `capacity` in bytes; None: no limit, so it only counts and cleans up."""

    def __init__(
        self, root: str, objects: str, capacity: int | None, usage: Usage, timing: Timing, log: Throttle
    ) -> None:
        self._lock_path = os.path.join(root, "janitor.lock")
        self._objects = objects
        self._capacity = capacity
        self._usage = usage
        self._timing = timing
        self._log = log
        self._tag = host_tag()
        self._closed = False
        self._fd = -1
        self.evicted = 0
        """Objects evicted by this process."""
        self.forked()

    def forked(self) -> None:
        """Resets the state in a forked child: no thread is running, and the lock belongs to the parent."""
        self._mutex = threading.RLock()  # guards passes and the lock file; reentrant: `close` may run in a finalizer
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_scan = 0.0
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
        if self._capacity is None or need > self._capacity:
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
                with self._mutex:
                    if not self._closed and self._acquire() and self._is_due():
                        self._collect(0)
            except OSError as error:
                self._log.warning("disk-janitor", path=self._objects, detail=str(error))
            self._wake.wait(self._timing.tick)

    def _is_short_of(self, need: int) -> bool:
        return self._capacity is not None and self._usage.read().used + need > self._capacity

    def _is_due(self) -> bool:
        if time.monotonic() >= self._next_scan:
            return True
        now = self._usage.read()
        return self._capacity is not None and (
            now.used > HIGH * self._capacity or now.used + now.wanted > self._capacity
        )

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
            os.close(fd)
            return False
        except OSError:
            pass  # no locks on this filesystem: several janitors are harmless, they only evict slightly early
        self._fd = fd
        self._next_scan = 0.0
        return True

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _collect(self, need: int) -> None:
        """Runs one pass: list, clean up, correct the count, evict. Mutex and lock must be held."""
        begun = time.monotonic()
        before = self._usage.read()
        entries: list[Entry] = []
        counted, now = 0, time.time()
        for entry in walk(self._objects):
            if self._closed:
                return
            if entry.temp:
                if is_stale(entry, self._tag, now, self._timing.temp_age):
                    unlink(entry.path)
                else:
                    counted += entry.size
            else:
                counted += entry.size
                entries.append(entry)
        if begun >= self._next_scan:
            prune(self._objects, now - self._timing.temp_age)
        used = self._usage.correct(before, counted).used
        if self._capacity is not None:
            need = max(need, before.wanted)
            if used > HIGH * self._capacity or used + need > self._capacity:
                self._evict(entries, used - max(0, min(int(LOW * self._capacity), self._capacity - need)))
        self._next_scan = begun + max(self._timing.rescan, 50 * (time.monotonic() - begun))

    def _evict(self, entries: list[Entry], excess: int) -> None:
        """Evicts objects of at least `excess` bytes in total, in the order given in the module's docstring."""
        grain = self._timing.grain
        entries.sort(key=lambda entry: (entry.used // grain, -depth_of(entry.name)))
        for entry in entries:
            if excess <= 0:
                break
            if self._usage.remove(entry.path, entry.size):
                self.evicted += 1
                excess -= entry.size
