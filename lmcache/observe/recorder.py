"""`record_trace`: which chunks each request consisted of, for `lmcache simulate`. Keys only: no text, no token ids.

One JSON line per request: seconds since the recording began, prompt tokens, tokens per chunk, and a key per full chunk. Keys
are hashes under a random secret of this process that is written nowhere: they tell which prefixes are equal, and nobody can
find out by trying whether a prompt of his own was among them. Not even what a later process records matches them.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
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
"""In which the last line is looked for: one of 150 thousand chunks."""


class Recorder:
    """Appends to a file that only its owner can read. Never raises: the first failure is one log line and the end of it."""

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
            self._end = weakref.finalize(self, _end, self._fd, self._lines)  # also when the process ends

    def record(self, tokens: int, digests: Sequence[bytes]) -> None:
        """A request of so many prompt tokens, with the digests of its full chunks."""
        if self._fd is None:
            return
        keys = [blake2b(digest, digest_size=_KEY_BYTES, key=self._secret).hexdigest() for digest in digests]
        with self._lock:
            if self._fd is None:  # closed meanwhile, or another thread's write failed
                return
            now = time.monotonic()
            seconds = round(now - self._start, 3)
            line = {"t": seconds, "tokens": tokens, "chunk_tokens": self._chunk, "keys": keys}
            self._lines.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._bytes += len(self._lines[-1])
            if self._bytes >= _FLUSH_BYTES or now - self._flushed >= _FLUSH_S:
                self._flush(self._fd, now)

    def close(self) -> None:
        """Write what is buffered, and record no more. Idempotent."""
        with self._lock:
            if self._fd is not None:
                self._flush(self._fd, time.monotonic())
            if self._fd is not None:
                self._fd = None
                self._end()

    def _flush(self, fd: int, now: float) -> None:
        self._bytes, self._flushed = 0, now
        try:
            _write(fd, self._lines)
        except OSError as error:
            self._fd = None
            self._end()
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        warning("trace-not-recorded", path=self._path, error=f"{type(error).__name__}: {error}")


def _write(fd: int, lines: list[bytes]) -> None:
    data = b"".join(lines)
    lines.clear()
    while data:
        data = data[os.write(fd, data) :]


def _end(fd: int, lines: list[bytes]) -> None:
    with suppress(OSError):
        _write(fd, lines)
    with suppress(OSError):
        os.close(fd)


def _open(path: Path) -> tuple[int, float]:
    """The file, which is this recorder's alone, and the time of its last line, where the recording goes on.

    Raises:
        OSError, ValueError: it cannot be opened, somebody else records to it, or it is no recording.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another engine records to it; give each a file of its own") from None
        except OSError:
            pass  # a filesystem without locks
        return fd, _last_time(fd)
    except BaseException:
        os.close(fd)
        raise


def _last_time(fd: int) -> float:
    """The time of the last line; 0 if there is none. One that was cut off, by a kill or a full disk, is taken away."""
    size = os.fstat(fd).st_size
    if not size:
        return 0.0
    tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    whole, _, cut = tail.rpartition(b"\n")
    try:
        seconds = float(json.loads(whole.rstrip().rpartition(b"\n")[2])["t"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("its last line is no request; name another file") from None
    if cut:
        os.ftruncate(fd, size - len(cut))
    return seconds
