"""A pool of daemon threads for blocking tier calls.

`concurrent.futures` joins its threads at interpreter exit, so a call that hangs in a dead remote would keep the engine's process
from ending. These threads are started on demand and may be abandoned.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Task = Callable[[], object]


class Workers:
    """Up to `threads` daemon threads that run tasks in the order they were submitted. Tasks must not raise."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._limit = threads
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._queued = 0
        self._closed = False

    @property
    def queued(self) -> int:
        """Number of tasks that no thread has started."""
        with self._lock:
            return self._queued

    def submit(self, task: Task) -> bool:
        """Queues `task`. Returns False if it will never run: the pool is closed, or has no thread and cannot start one."""
        with self._lock:
            if self._closed:
                return False
            if self._idle <= self._queued and len(self._threads) < self._limit:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has no more threads; those of the pool suffice
                    if not self._threads:
                        return False
                else:
                    self._threads.append(thread)
            self._queued += 1
            self._tasks.put(task)
        return True

    def close(self, timeout: float = 5.0) -> bool:
        """Finishes queued tasks and ends the threads; False if that takes longer than `timeout` seconds."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
            for _ in threads:
                self._tasks.put(None)
        until = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            task = self._tasks.get()
            with self._lock:
                self._idle -= 1
                if task is not None:
                    self._queued -= 1
            if task is None:
                return
            task()
