"""Ends a process group for good: on return none of it runs any more, so none of it can still write."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_WAIT_S = 10.0


def kill_group(group: int) -> None:
    """kill −9 to every process of `group` (an id as `start_new_session=True` makes one), and wait until they are gone."""
    until = time.monotonic() + _WAIT_S
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        if not members(group) or time.monotonic() > until:
            return
        time.sleep(0.01)


def members(group: int) -> list[int]:
    """Process ids of a group that still run; zombies, which nobody may ever collect in a container, don't count."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                state, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue  # it ended while we looked
            if int(owner) == group and state not in "ZX":
                found.append(int(entry.name))
    return found
