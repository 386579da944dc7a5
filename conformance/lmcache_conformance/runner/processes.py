"""Ends processes: groups of them, so that none can still write files, and those whose parent has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_WAIT_S = 10.0
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def unwound_when_terminated() -> Iterator[None]:
    """While this is open, SIGTERM and SIGHUP raise `SystemExit`, so that `finally` blocks end what was started.

    Has no effect outside of the main thread, and on signals that somebody handles or ignores.
    """
    main = threading.current_thread() is threading.main_thread()
    mine = [n for n in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(n) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_with_parent(parent: int) -> None:
    """Kills this process when the one with id `parent`, which started it, has ended, even by SIGKILL. Only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_group(group: int) -> None:
    """Sends SIGKILL to every process of `group` (as created by `start_new_session=True`) and waits for their end."""
    until = time.monotonic() + _WAIT_S
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        if not members(group) or time.monotonic() > until:
            return
        time.sleep(0.01)


def members(group: int) -> list[int]:
    """Returns the ids of a group's running processes. Ignores zombies, which may never be reaped in a container."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                state, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue  # the process has just ended
            if int(owner) == group and state not in "ZX":
                found.append(int(entry.name))
    return found
