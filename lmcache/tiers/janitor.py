"""Keeps one folder within its capacity, for all processes that write to it.

Every process with a disk tier runs a janitor thread; the one that holds the lock on `<root>/janitor.lock` works, the others
wait for it to end. Holding the lock, a janitor lists the folder now and then, corrects the shared count, removes what killed
processes left behind, and evicts: what was used longest ago first, and of what was used at about the same time the deepest
chunks first, because a chunk is worth nothing without those before it.
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
"""Evict when more than HIGH of the capacity is used, down to LOW: writers need headroom while a pass is under way."""

_GRACE = 5.0
"""Seconds that `close` waits for a pass under way."""


class Timing(NamedTuple):
    """How often things happen, in seconds.

    Attributes:
        tick: how often the holder looks at the shared count, and the others try to become the holder.
        rescan: how often the folder is listed though nothing calls for it (at most a fiftieth of the time goes there).
        temp_age: temporaries of unknown processes older than this are removed.
        grain: uses this close together count as simultaneous.
        patience: how long a writer waits for another process's janitor to make room.
    """

    tick: float = 0.25
    rescan: float = 60.0
    temp_age: float = 600.0
    grain: float = 60.0
    patience: float = 0.5


class Janitor:
    """The janitor of one folder in this process. `capacity` in bytes; None: no limit, only accounts and cleans up."""

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
        """Start over: in a new process nothing is running, and the parent's lock is not ours."""
        self._mutex = threading.RLock()  # one pass, one change of the lock at a time; `close` may come from a finalizer
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_scan = 0.0
        if self._fd >= 0:
            os.close(self._fd)  # closing does not unlock: the parent still has it open
        self._fd = -1

    def start(self) -> None:
        """Run in the background, unless it does already."""
        if self._thread is None or not self._thread.is_alive():
            with self._mutex:
                if not self._closed and (self._thread is None or not self._thread.is_alive()):
                    self._thread = threading.Thread(target=self._run, name="lmcache-janitor", daemon=True)
                    self._thread.start()

    @property
    def holds_lock(self) -> bool:
        """Whether this process is the one that cleans up."""
        return self._fd >= 0

    def make_room(self, need: int, deadline: float | None) -> bool:
        """Try to have `need` bytes free. True: try again now. Blocks while another process's janitor is at it."""
        if self._capacity is None or need > self._capacity:
            return False
        until = time.monotonic() + self._timing.patience
        if deadline is not None:
            until = min(until, deadline)
        while not self._closed:
            if self._mutex.acquire(timeout=max(0.0, until - time.monotonic())):
                try:
                    if self._lacking(need) and self._hold():  # else another thread made room meanwhile
                        self._collect(need)
                except OSError as error:
                    self._log.warning("disk-janitor", path=self._objects, detail=str(error))
                finally:
                    self._mutex.release()
            if not self._lacking(need):
                return True
            if self.holds_lock or time.monotonic() >= until:
                return False
            time.sleep(min(0.01, self._timing.tick))
        return False

    def collect(self) -> bool:
        """One pass now, if this process holds or gets the lock (else False)."""
        with self._mutex:
            if not self._hold():
                return False
            self._collect(0)
            return True

    def close(self) -> None:
        """Stop the thread, release the lock. Idempotent. Does not wait for ever for a filesystem that hangs."""
        self._closed = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_GRACE)
        if self._mutex.acquire(timeout=_GRACE):
            self._release()
            self._mutex.release()

    def _run(self) -> None:
        while not self._closed:
            try:
                with self._mutex:
                    if not self._closed and self._hold() and self._due():
                        self._collect(0)
            except OSError as error:
                self._log.warning("disk-janitor", path=self._objects, detail=str(error))
            self._wake.wait(self._timing.tick)

    def _lacking(self, need: int) -> bool:
        return self._capacity is not None and self._usage.read().used + need > self._capacity

    def _due(self) -> bool:
        if time.monotonic() >= self._next_scan:
            return True
        now = self._usage.read()
        return self._capacity is not None and (
            now.used > HIGH * self._capacity or now.used + now.wanted > self._capacity
        )

    def _hold(self) -> bool:
        """Get the lock, or see that we still have it. Mutex held."""
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
            pass  # no locks on this filesystem: several janitors do no harm, they only evict a little early
        self._fd = fd
        self._next_scan = 0.0
        return True

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _collect(self, need: int) -> None:
        """One pass: list, clean up, correct the count, evict. Mutex and lock held."""
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
        """Remove at least `excess` bytes of objects, the least valuable first."""
        grain = self._timing.grain
        entries.sort(key=lambda entry: (entry.used // grain, -depth_of(entry.name)))
        for entry in entries:
            if excess <= 0:
                break
            if self._usage.remove(entry.path, entry.size):
                self.evicted += 1
                excess -= entry.size
