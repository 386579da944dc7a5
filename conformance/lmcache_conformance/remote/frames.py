"""Messages between a test and an engine's process: magic, length and a msgpack body, over pipes."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec

from lmcache_conformance.contract import SessionConfig

MAX_FRAME = 1 << 30
_HEAD = struct.Struct("<4sI")
_MAGIC = b"LMCF"
_POLL_S = 0.25
"""Interval at which a waiting side checks whether the other one still runs."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """Parent → child, the first message: the adapter, its configuration, and the parent's `sys.path`."""

    adapter: str
    config: SessionConfig
    path: tuple[str, ...]


class Call(msgspec.Struct, frozen=True, tag=True):
    """Parent → child: call a method of the session."""

    method: str
    arguments: dict[str, Any]


class Returned(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: the method's return value."""

    value: Any


class Raised(msgspec.Struct, frozen=True, tag=True):
    """Child → parent: the exception that the method raised, with its traceback."""

    error: str
    message: str
    traceback: str


class BadFrameError(ValueError):
    """The bytes read are not a message."""


class FrameTimeoutError(TimeoutError):
    """No complete message arrived in time."""


def send(fd: int, message: Any) -> None:
    """Writes one message. Raises `BrokenPipeError` if the reader has closed the pipe."""
    body = msgspec.msgpack.encode(message)
    data = memoryview(_HEAD.pack(_MAGIC, len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int, kinds: Any, *, timeout_s: float | None = None, alive: Callable[[], bool] = lambda: True) -> Any:
    """Reads one message.

    Args:
        fd: pipe to read from.
        kinds: union of the message types to decode.
        timeout_s: None waits without limit.
        alive: tells whether the other side still runs; after its death its children may still hold the pipe open.

    Raises:
        EOFError: the other side has ended.
        FrameTimeoutError: no complete message within `timeout_s`.
        BadFrameError: something else was written to the pipe.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    head = _exactly(fd, _HEAD.size, deadline, alive)
    magic, length = _HEAD.unpack(head)
    if magic != _MAGIC or length > MAX_FRAME:
        raise BadFrameError(f"not a message: {head!r}")
    try:
        return msgspec.msgpack.decode(_exactly(fd, length, deadline, alive), type=kinds)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadFrameError(f"not a message: {error}") from None


def _exactly(fd: int, length: int, deadline: float | None, alive: Callable[[], bool]) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        if deadline is not None and not _ready(fd, deadline, alive):
            raise FrameTimeoutError
        part = os.read(fd, min(1 << 20, length - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _ready(fd: int, deadline: float, alive: Callable[[], bool]) -> bool:
    while (left := deadline - time.monotonic()) > 0:
        was_alive = alive()  # checked before `select`, so that what was written before death is still read
        if select.select([fd], [], [], min(left, _POLL_S))[0]:
            return True
        if not was_alive:
            raise EOFError
    return False
