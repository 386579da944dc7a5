"""Records request traces (`record_trace`) for `lmcache simulate`: the chunks of each request, without text or token ids.

One JSON line per request: seconds since the recording began, prompt tokens, tokens per chunk, and a key per full chunk. Keys
are hashes keyed with a random secret of this process that is never stored: equal keys mean equal prefixes, but nobody can
test whether a given prompt was recorded. Keys of different processes never match.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock

from lmcache.observe.log import warning

_KEY_BYTES = 12
_FLUSH_BYTES = 1 << 16
_FLUSH_S = 1.0
_TAIL_BYTES = 1 << 22
"""Bytes at the end of the file searched for the last line; enough for a line of 150,000 chunks."""


class Recorder:
    """Appends requests to a file readable by its owner only. Never raises: the first failure is logged and ends the recording."""

    def __init__(self, path: str | Path, chunk_tokens: int) -> None:
        self._chunk = chunk_tokens
        self._secret = secrets.token_bytes(32)
        self._lock = Lock()
        self._lines: list[bytes] = []
        self._bytes = 0
        self._flushed = 0.0
        self._fd: int | None = None
        self._path = path
        try:
            self._fd, before = _open(Path(path).expanduser())
        except (OSError, RuntimeError, ValueError) as error:
            self._give_up(error)
        else:
            self._start = time.monotonic() - before
            self._finish = weakref.finalize(self, _finish, self._fd, self._lines)  # also runs when the process ends

    def record(self, tokens: int, digests: Sequence[bytes]) -> None:
        """Records a request of `tokens` prompt tokens with the digests of its full chunks."""
        if self._fd is None:
            return
        keys = [blake2b(digest, digest_size=_KEY_BYTES, key=self._secret).hexdigest() for digest in digests]
        with self._lock:
            if self._fd is None:  # closed, or a write failed, in another thread
                return
            now = time.monotonic()
            seconds = round(now - self._start, 3)
            line = {"t": seconds, "tokens": tokens, "chunk_tokens": self._chunk, "keys": keys}
            self._lines.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._bytes += len(self._lines[-1])
            if self._bytes >= _FLUSH_BYTES or now - self._flushed >= _FLUSH_S:
                self._flush(self._fd, now)

    def close(self) -> None:
        """Writes what is buffered and stops recording. Idempotent."""
        with self._lock:
            if self._fd is not None:
                self._flush(self._fd, time.monotonic())
            if self._fd is not None:
                self._fd = None
                self._finish()

    def _flush(self, fd: int, now: float) -> None:
        self._bytes, self._flushed = 0, now
        try:
            _write(fd, self._lines)
        except OSError as error:
            self._fd = None
            self._finish()
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        warning("trace-not-recorded", path=self._path, error=f"{type(error).__name__}: {error}")


def _write(fd: int, lines: list[bytes]) -> None:
    data = b"".join(lines)
    lines.clear()
    while data:
        data = data[os.write(fd, data) :]


def _finish(fd: int, lines: list[bytes]) -> None:
    with suppress(OSError):
        _write(fd, lines)
    with suppress(OSError):
        os.close(fd)


def _open(path: Path) -> tuple[int, float]:
    """Opens and locks the file. Returns its descriptor and the time of its last line, from which the recording continues.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another engine records to it, it is not a recording, or others can read or have placed it.
    """
    try:  # O_NONBLOCK: do not wait for the other end of a FIFO
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise ValueError("it is a symbolic link, which is not followed; name the file itself") from None
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file; choose another file")
        if found.st_uid != os.geteuid():
            raise ValueError(f"it belongs to another user (uid {found.st_uid}), who could read it; choose another file")
        if found.st_nlink > 1:
            raise ValueError(
                "it has several names (hard links), and may be another program's file; choose another file"
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another engine records to it; give each engine its own file") from None
        except OSError:
            pass  # a filesystem without locks
        before = _last_time(fd)
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(fd, 0o600)
        return fd, before
    except BaseException:
        os.close(fd)
        raise


def _last_time(fd: int) -> float:
    """Returns the time of the last line, or 0 if the file is empty. Truncates an incomplete last line (kill, full disk)."""
    size = os.fstat(fd).st_size
    if not size:
        return 0.0
    tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    complete, _, partial = tail.rpartition(b"\n")
    try:
        seconds = float(json.loads(complete.rstrip().rpartition(b"\n")[2])["t"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("its last line is not a request; choose another file") from None
    if partial:
        os.ftruncate(fd, size - len(partial))
    return seconds
