"""Common parts of the engine adapters: refusing what cannot be cached, checking the engine's version, sharing its log, and
containing exceptions of the cache.

Imports neither an engine nor a tensor library.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from lmcache.errors import LMCacheError
from lmcache.observe.log import LOGGER, Throttle
from lmcache.observe.metrics import Metrics

T = TypeVar("T")

_RELEASE: Final = re.compile(r"\d+(\.\d+)*")


class UnsupportedError(Exception):
    """This engine release, model, option or call cannot be cached; the message contains the reason.

    Attributes:
        reason: short slug for metrics and logs, e.g. `beams`.
    """

    def __init__(self, detail: str, *, reason: str = "unsupported") -> None:
        super().__init__(detail)
        self.reason = reason


def check_version(
    engine: str, version: str, *, tested: Sequence[str], oldest: Sequence[int], component: str = "adapter"
) -> str:
    """Compares an engine's version with those that an adapter is tested with.

    Args:
        engine: display name, e.g. `vLLM`.
        version: as the engine reports it, e.g. `0.32.1+cu129`.
        tested: releases (`0.5.23`) or series (`0.32`, which covers `0.32.1`).
        oldest: first release that can work at all, e.g. `(0, 28)`.
        component: the engine's term for the adapter.

    Returns:
        A warning if this release is untested, else an empty string.

    Raises:
        UnsupportedError: the release is older than `oldest`.
    """
    public = version.split("+")[0]
    found = _RELEASE.match(public)
    release = found.group() if found else ""
    if found and tuple(map(int, release.split(".")))[: len(oldest)] < tuple(oldest):
        raise UnsupportedError(
            f"{engine} {version} is too old; the {component} needs {'.'.join(map(str, oldest))} or newer"
        )
    if public in tested or any(release.startswith(f"{series}.") for series in tested):
        return ""
    return (
        f"{engine} {version} was never tested with this {component}, only {', '.join(tested)}; "
        "the layout proof still holds"
    )


def join_log(engine: str = "") -> None:
    """Sends the cache's log lines to the engine's log, at the engine's level, unless the application has configured logging.

    Args:
        engine: name of the engine's logger; empty if the engine configures the root logger, which receives the cache's lines
            anyway: then only the level is set.
    """
    root, logger = logging.getLogger(), logging.getLogger(engine)
    if LOGGER.level != logging.NOTSET or not logger.isEnabledFor(logging.INFO):
        return
    if logger is root:
        LOGGER.setLevel(logging.INFO)
    elif not LOGGER.handlers and not root.handlers:
        LOGGER.setLevel(logger.level)
        LOGGER.propagate = logger.propagate
        for handler in logger.handlers:
            LOGGER.addHandler(handler)


def describe(error: BaseException) -> str:
    """Returns an exception's type and message."""
    return f"{type(error).__name__}: {error}"


def reason_of(error: Exception) -> str:
    """Returns why caching is off: the message of an expected error; for other exceptions, type and message."""
    return str(error) if isinstance(error, (LMCacheError, UnsupportedError)) else describe(error)


def guarded(call: Callable[[], T], default: T, on_error: Callable[[Exception], object]) -> T:
    """Returns `call()`; if it raises, runs `on_error` with the exception and returns `default`.

    The engine's request continues without the cache. An exception raised by `on_error` itself is not caught.
    """
    try:
        return call()
    except Exception as error:
        on_error(error)
        return default


def record_failure(
    error: Exception, event: str, log: Throttle, metrics: Metrics | None = None, *, key: object = None, **fields: object
) -> None:
    """Counts an unexpected exception as `connector` / `internal` in `metrics`, and logs one throttled line.

    Args:
        event: name of the log event; its fields are `fields` and `reason`.
        key: throttles separately from other keys of the same event.
    """
    if metrics is not None:
        metrics.failed("connector", "internal")
    log.warning(event, key=key, **fields, reason=describe(error))
