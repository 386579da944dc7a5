"""Delays Python signal handlers while the cache changes its state.

Python runs a signal handler between any two instructions of the main thread. A handler that raises, such as the one for Ctrl-C,
would end a change of state half-way: slots would be neither free nor in use, jobs neither running nor ended. During a function
that is `uninterrupted` signals are recorded instead, and handled when it returns, or earlier where it calls `deliver`.

Other threads run no signal handlers; there, all of this does nothing.
"""

from __future__ import annotations

import functools
import importlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))

# What `signal` wraps: its own functions also convert results to enums, and take ten times as long.
_raw: Any = importlib.import_module("_signal")
_get: Callable[[int], Any] = _raw.getsignal
_set: Callable[[int, Any], Any] = _raw.signal

_pending: list[tuple[_Recorder, int, FrameType | None]] = []
_delaying = False  # only the main thread changes and reads it


class _Recorder:
    """Takes the place of a handler: records the signal while handlers are delayed, otherwise calls the handler."""

    __slots__ = ("handler",)

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if _delaying:
            _pending.append((self, signum, frame))
        else:  # the previous function could not restore the handler, because another one raised
            self.handler(signum, frame)


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function during which no Python signal handler runs, except where it calls `deliver`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        global _delaying
        if _delaying or threading.get_ident() != threading.main_thread().ident:
            return function(*args, **kwargs)
        replaced = []
        try:
            for signum in _SIGNALS:
                handler = _get(signum)
                if callable(handler):
                    original = handler.handler if isinstance(handler, _Recorder) else handler
                    replaced.append((signum, original))
                    _set(signum, _Recorder(original))
            _delaying = True
            return function(*args, **kwargs)
        finally:
            _delaying = False  # first: a recorder that stays installed then calls its handler
            for signum, original in replaced:
                _set(signum, original)
            deliver()

    return call


def deliver() -> None:
    """Runs the handlers of the signals that came since; call it where the state is consistent. Raises what they raise."""
    if _pending and threading.get_ident() == threading.main_thread().ident:
        recorded = _pending[:]
        _pending.clear()
        for recorder, signum, frame in recorded:
            recorder.handler(signum, frame)
