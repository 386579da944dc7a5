"""One-line structured logs over the standard library: `event key=value key=value`, under the logger `lmcache`.

A library does not configure logging: records below WARNING are dropped unless the application enables them, and warnings
reach stderr through Python's handler of last resort. Events that can occur on every request are logged through a `Throttle`.
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
    """Logs one line: `name` (hyphenated words) and its fields. Nothing is formatted if `level` is disabled."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, "%s", render(name, fields), stacklevel=2)


def warning(name: str, /, **fields: object) -> None:
    """Logs one line about a failure that was handled."""
    if LOGGER.isEnabledFor(logging.WARNING):
        LOGGER.warning("%s", render(name, fields), stacklevel=2)


def info(name: str, /, **fields: object) -> None:
    """Logs one line of information for operators, for events that happen once or rarely."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("%s", render(name, fields), stacklevel=2)


def render(name: str, fields: dict[str, object]) -> str:
    """Returns `name key=value …` on one line; values with spaces, quotes, `=` or control characters are quoted and escaped."""
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
    """Rate-limits log lines: logs the same event at most once per `every` seconds, with the number of suppressed repeats.

    Owned by the component that logs (no module state); thread-safe. `every=inf` logs each event once. Tracks at most `limit`
    different events; beyond that, the one logged least recently is dropped.
    """

    def __init__(self, every: float = 30.0, limit: int = 1024) -> None:
        self._every = every
        self._limit = limit
        self._lock = Lock()
        self._logged: dict[tuple[str, object], tuple[float, int]] = {}

    def allow(self, name: str, key: object = None, now: float | None = None) -> int | None:
        """Returns None to suppress the line; otherwise how often it has been suppressed. `now`: seconds (default: monotonic)."""
        now = monotonic() if now is None else now
        with self._lock:
            last, suppressed = self._logged.get((name, key), (None, 0))
            if last is not None and now - last < self._every:
                self._logged[name, key] = (last, suppressed + 1)
                return None
            self._logged.pop((name, key), None)
            if len(self._logged) >= self._limit:
                del self._logged[next(iter(self._logged))]
            self._logged[name, key] = (now, 0)
            return suppressed

    def warning(self, name: str, /, key: object = None, **fields: object) -> None:
        """Logs like the function `warning`, rate-limited by `name` and `key`."""
        suppressed = self.allow(name, key)
        if suppressed is not None and LOGGER.isEnabledFor(logging.WARNING):
            fields = fields | {"repeated": suppressed} if suppressed else fields
            LOGGER.warning("%s", render(name, fields), stacklevel=2)
