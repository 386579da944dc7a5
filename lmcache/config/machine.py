"""Facts about this machine that settings depend on: memory limit, WSL2, container. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int | None:
    """Returns the bytes of memory this process may use: the minimum of physical memory and all enclosing cgroup limits.

    None if neither is known (then nothing is checked against it). `root` is the folder that contains `proc` and `sys`.
    """
    limits = list(_cgroup_limits(root))
    physical = _physical_memory(root)
    if physical is not None:
        limits.append(physical)
    return min(limits, default=None)


def is_wsl(root: Path = Path("/")) -> bool:
    """Returns whether this is WSL (Windows Subsystem for Linux), where large pinned allocations often fail."""
    return "microsoft" in (_read(root / "proc/sys/kernel/osrelease") or platform.release()).lower()


def is_container(root: Path = Path("/")) -> bool:
    """Returns whether this looks like a container, where locked memory is often limited."""
    return (root / ".dockerenv").exists() or (root / "run/.containerenv").exists()


def memory_filesystem(path: Path, root: Path = Path("/")) -> str | None:
    """Returns the type of the file system at `path` if its files are kept in memory (`tmpfs`, `ramfs`), otherwise None."""
    device = path.stat().st_dev
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            name = kind.split()[0]
            return name if name in ("tmpfs", "ramfs") else None
    return None


def _physical_memory(root: Path) -> int | None:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) * 1024  # the unit kB of /proc/meminfo is KiB
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Yields every memory limit of this process's cgroup and its ancestors, for cgroup v1 and v2."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            base, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Inside a container `path` may be the host's and not exist here; then the root of the mount is the container's cgroup.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            text = _read(base.joinpath(*parts[:depth]) / name)
            if text and text.strip().isdigit():  # no limit is "max" in v2, and a number near 2**63 in v1
                yield int(text)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
