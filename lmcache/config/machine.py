"""What this machine is, as far as settings depend on it: memory that may be used, WSL2. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory this process may ever use: the least of physical memory and all cgroup limits above it.

    None where neither is known (then nothing is checked against it). `root` is where `proc` and `sys` are looked up.
    """
    limits = list(_cgroup_limits(root))
    physical = _physical_memory(root)
    if physical is not None:
        limits.append(physical)
    return min(limits, default=None)


def is_wsl(root: Path = Path("/")) -> bool:
    """Whether this is Windows' Linux subsystem, where large pinned allocations commonly fail."""
    return "microsoft" in (_read(root / "proc/sys/kernel/osrelease") or platform.release()).lower()


def is_container(root: Path = Path("/")) -> bool:
    """Whether this looks like a container, where locked memory is often limited."""
    return (root / ".dockerenv").exists() or (root / "run/.containerenv").exists()


def _physical_memory(root: Path) -> int | None:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) * 1024  # /proc/meminfo says kB and means KiB
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Every memory limit of this process's cgroup and the ones around it, of either cgroup version."""
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
        # Inside a container `path` may be the host's and not exist here; the mount's own root is then the container's.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            text = _read(base.joinpath(*parts[:depth]) / name)
            if text and text.strip().isdigit():  # version 2 writes "max" for none, version 1 a number near 2**63
                yield int(text)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
