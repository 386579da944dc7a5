"""One-line structured logs over the standard library: `event key=value key=value`, under the logger `lmcache`.

A library does not configure logging: records below WARNING go nowhere unless the application asks for them, and warnings
reach stderr through Python's handler of last resort. What may happen for every request is said through a `Throttle`.
"""

from __future__ import annotations

import logging
import re
from threading import Lock
from time import monotonic
from typing import Final

LOGGER: Final = logging.getLogger("lmcache")

_PLAIN: Final = re.compile(r"[^\s\"'=]+")


def event(level: int, name: str, /, **fields: object) -> None:
    """Log one line: `name` (a few words with hyphens) and its fields. Costs nothing if `level` is off."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, "%s", render(name, fields), stacklevel=2)


def warning(name: str, /, **fields: object) -> None:
    """Log one line that says something went wrong and was dealt with."""
    if LOGGER.isEnabledFor(logging.WARNING):
        LOGGER.warning("%s", render(name, fields), stacklevel=2)


def info(name: str, /, **fields: object) -> None:
    """Log one line of what an operator may want to know once."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("%s", render(name, fields), stacklevel=2)


def render(name: str, fields: dict[str, object]) -> str:
    """`name key=value …` on one line; values with spaces, quotes, `=` or control characters are quoted and escaped."""
    return " ".join([name, *(f"{key}={_value(value)}" for key, value in fields.items())])


def _value(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[:16]).hex() or '""'
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in quoted) + '"'


class Throttle:
    """Says the same thing at most once per `every` seconds; the next line then tells how often it was held back.

    Owned by whoever logs (no module state); thread-safe. `every=inf` means once in its life. It remembers at most `limit`
    different things; when there are more, the one said longest ago is forgotten.
    """

    def __init__(self, every: float = 30.0, limit: int = 1024) -> None:
        self._every = every
        self._limit = limit
        self._lock = Lock()
        self._said: dict[tuple[str, object], tuple[float, int]] = {}

    def allow(self, name: str, key: object = None, now: float | None = None) -> int | None:
        """None: hold back. Otherwise: say it, it was held back this many times. `now` is in seconds (default: monotonic)."""
        now = monotonic() if now is None else now
        with self._lock:
            last, held = self._said.get((name, key), (None, 0))
            if last is not None and now - last < self._every:
                self._said[name, key] = (last, held + 1)
                return None
            self._said.pop((name, key), None)
            if len(self._said) >= self._limit:
                del self._said[next(iter(self._said))]
            self._said[name, key] = (now, 0)
            return held

    def warning(self, name: str, /, key: object = None, **fields: object) -> None:
        """`warning`, throttled by `name` and `key`."""
        held = self.allow(name, key)
        if held is not None and LOGGER.isEnabledFor(logging.WARNING):
            fields = fields | {"repeated": held} if held else fields
            LOGGER.warning("%s", render(name, fields), stacklevel=2)
