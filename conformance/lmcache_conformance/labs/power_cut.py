"""What a power loss would leave of a folder: runs a program under `ptrace`, and copies what it has synced so far.

Only what was synced counts: the bytes of a file when `fsync`, `fdatasync` or `msync` was called on it, the names in a folder when
`fsync` was called on it, and everything at a `syncfs` or `sync`. All else is regarded as lost, as a filesystem is allowed to
lose it. The program (or any library it uses, in any language) is not changed; only itself it has to say, by signals, when the
power is cut:

    watched()                # from here on; threads started later are watched, too
    tier.write(…)
    tier.flush(durable=True)
    cut()                    # what is synced by now is copied to the next folder: `0`, `1`, …

Run as `python power_cut.py PLACE COPIES COMMAND…`, in a process of its own: a tracer has to wait for all its children. It imports
the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

HOLD_S = 0.5
"""How long the first sync after `hold` is delayed; other threads run meanwhile."""

_CUT, _HOLD = signal.SIGUSR2, signal.SIGUSR1
_SYNCS = {
    "x86_64": {74: "fsync", 75: "fsync", 26: "msync", 306: "syncfs", 162: "sync"},
    "aarch64": {82: "fsync", 83: "fsync", 227: "msync", 267: "syncfs", 81: "sync"},
}
"""Numbers of the system calls that make something durable; fdatasync counts as fsync."""

_TRACEME, _CONT, _SETOPTIONS, _GETEVENTMSG, _SYSCALL, _GET_SYSCALL_INFO = 0, 7, 0x4200, 0x4201, 24, 0x420E
_SYSGOOD, _FORK, _VFORK, _CLONE, _EXITKILL = 1, 2, 4, 8, 0x100000
_WALL = 0x40000000
_MS_SYNC = 4
_GETVERSION = 0x80087601
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def why_not() -> str | None:
    """Returns why programs cannot be watched here; None if they can."""
    if _libc is None or platform.machine() not in _SYNCS:
        return (
            f"system calls are observed on Linux, on x86-64 and arm64 only, not on {sys.platform} {platform.machine()}"
        )
    try:
        pid = subprocess.Popen([sys.executable, "-c", _PROBE]).wait()
    except OSError as error:
        return f"no process can be started: {error}"
    return None if pid == 0 else "system calls cannot be observed here: this host forbids ptrace"


_PROBE = "import ctypes, os; os._exit(ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0)"


# ------------------------------------------------------------------ in the program


def watched() -> None:
    """Begins: the process that started this one observes it from here on."""
    assert _libc is not None
    if _libc.ptrace(_TRACEME, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot be observed")
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def cut() -> None:
    """The power is cut here: what is synced by now is copied. The process goes on."""
    signal.pthread_kill(threading.get_ident(), _CUT)


def hold() -> None:
    """Delays the next call that syncs something, until another thread has had `HOLD_S` seconds to overtake it."""
    signal.pthread_kill(threading.get_ident(), _HOLD)


# ------------------------------------------------------------------ the medium


class _Inode(NamedTuple):
    """A file or folder, for as long as it exists. A number alone is given to another file when the first is removed."""

    number: int
    generation: int
    is_folder: bool


class _Durable:
    """What is durable of the files and folders below `place`."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._bytes: dict[_Inode, bytes] = {}
        self._names: dict[_Inode, dict[str, _Inode]] = {}

    def add(self, other: _Durable) -> None:
        """What is durable in `other` is durable here, too."""
        self._bytes |= other._bytes
        self._names |= other._names

    def sync(self, path: str, name: str) -> None:
        """Syncs the file or folder called `name`; `path` leads to it even if that name is gone."""
        if not Path(name).is_relative_to(self._place):
            return
        with contextlib.suppress(OSError):  # removed meanwhile
            if os.path.isdir(path):
                self._names[_inode(path)] = {name: _inode(os.path.join(path, name)) for name in os.listdir(path)}
            else:
                self._bytes[_inode(path)] = Path(path).read_bytes()

    def sync_all(self, path: str) -> None:
        """Syncs the filesystem that holds `path`."""
        if os.stat(path).st_dev != os.stat(self._place).st_dev:
            return
        self.sync(str(self._place), str(self._place))
        for folder, folders, files in os.walk(self._place):
            for name in (*folders, *files):
                found = os.path.join(folder, name)
                self.sync(found, found)

    def copy(self, target: Path) -> None:
        """Writes what is durable to `target`. A file whose bytes were never synced is empty."""
        self._copy(_inode(str(self._place)), target)

    def _copy(self, folder: _Inode, target: Path) -> None:
        target.mkdir(parents=True, mode=0o700)
        for name, inode in self._names.get(folder, {}).items():
            if inode.is_folder:
                self._copy(inode, target / name)
            else:
                (target / name).write_bytes(self._bytes.get(inode, b""))


def _inode(path: str) -> _Inode:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status, generation = os.fstat(fd), bytes(8)
        with contextlib.suppress(OSError):  # a filesystem that gives no number twice has none
            generation = fcntl.ioctl(fd, _GETVERSION, generation)
        return _Inode(status.st_ino, int.from_bytes(generation, "little"), stat.S_ISDIR(status.st_mode))
    finally:
        os.close(fd)


# ------------------------------------------------------------------ the observer


class _SyscallInfo(ctypes.Structure):
    """`struct ptrace_syscall_info`; `value`: the number of the call at its entry, its result at its exit."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("value", ctypes.c_int64),
        ("arguments", ctypes.c_uint64 * 6),
    )


class _Observer:
    """Runs one program, with all its threads and children, to its end."""

    def __init__(self, place: Path, copies: Path) -> None:
        self._place = place
        self._durable = _Durable(place)
        self._durable.sync_all(str(place))
        self._copies = copies
        self._cuts = 0
        self._calls = _SYNCS[platform.machine()]
        self._hold = False
        self._held: dict[int, float] = {}
        self._begun: dict[int, _Durable] = {}

    def run(self, command: list[str]) -> int:
        """Returns the program's exit status; 128 + the signal's number if it was killed."""
        main = subprocess.Popen(command).pid
        status = os.waitpid(main, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        _ptrace(_SETOPTIONS, main, _SYSGOOD | _FORK | _VFORK | _CLONE | _EXITKILL)
        _ptrace(_SYSCALL, main)
        while True:
            self._release()
            try:
                tid, status = os.waitpid(-1, _WALL | (os.WNOHANG if self._held else 0))
            except ChildProcessError:
                return 1
            if tid == 0:
                time.sleep(0.002)
            elif os.WIFSTOPPED(status):
                self._stopped(tid, status)
            elif tid == main:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _release(self) -> None:
        for tid in [tid for tid, until in self._held.items() if time.monotonic() > until]:
            del self._held[tid]
            _ptrace(_SYSCALL, tid)

    def _stopped(self, tid: int, status: int) -> None:
        number, deliver = os.WSTOPSIG(status), 0
        if number == signal.SIGTRAP | 0x80:
            if self._syscall(tid):
                self._held[tid] = time.monotonic() + HOLD_S
                return
        elif number == _CUT:
            self._durable.copy(self._copies / str(self._cuts))
            self._cuts += 1
        elif number == _HOLD:
            self._hold = True
        elif number not in (signal.SIGTRAP, signal.SIGSTOP):  # events, and new threads
            deliver = number
        _ptrace(_SYSCALL, tid, deliver)

    def _syscall(self, tid: int) -> bool:
        """Handles the entry or exit of a call. Returns whether to hold the thread."""
        info = _SyscallInfo()
        assert _libc is not None
        if _libc.ptrace(_GET_SYSCALL_INFO, tid, ctypes.c_void_p(ctypes.sizeof(info)), ctypes.byref(info)) < 0:
            return False
        if info.op == 1 and (call := self._calls.get(info.value)):
            self._begun[tid] = self._entered(tid, call, list(info.arguments))
            held, self._hold = self._hold, False
            return held
        if info.op == 2 and (begun := self._begun.pop(tid, None)) is not None and info.value == 0:
            self._durable.add(begun)
        return False

    def _entered(self, tid: int, call: str, arguments: list[int]) -> _Durable:
        """Returns what the call will have made durable once it has succeeded: what is there when it begins."""
        synced = _Durable(self._place)
        path = f"/proc/{tid}/fd/{ctypes.c_int(arguments[0]).value}"
        if call == "sync":
            synced.sync_all(str(self._place))
        elif call == "msync":
            if arguments[2] & _MS_SYNC and (mapped := _mapped(tid, arguments[0])):
                synced.sync(mapped, mapped)
        elif name := _link(path):
            if call == "syncfs":
                synced.sync_all(path)
            else:
                synced.sync(path, name)
        return synced


def _ptrace(request: int, tid: int, data: int = 0) -> None:
    """Calls ptrace; a thread that has just been killed is no error."""
    assert _libc is not None
    _libc.ptrace(request, tid, ctypes.c_void_p(0), ctypes.c_void_p(data))


def _link(path: str) -> str:
    try:
        return os.readlink(path).removesuffix(" (deleted)")
    except OSError:
        return ""


def _mapped(tid: int, address: int) -> str | None:
    """Returns the path of the file that is mapped at an address."""
    for line in Path(f"/proc/{tid}/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return path
    return None


if __name__ == "__main__":
    place, copies, *command = sys.argv[1:]
    shutil.rmtree(copies, ignore_errors=True)
    sys.exit(_Observer(Path(place).resolve(), Path(copies)).run(command))
