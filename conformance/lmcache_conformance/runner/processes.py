"""Kills process groups and waits for their end, so that none of their processes can still write files."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_WAIT_S = 10.0


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
