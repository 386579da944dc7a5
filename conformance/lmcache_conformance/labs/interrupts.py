"""Interrupts a call at a given moment, as Ctrl-C may."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import lmcache

_ROOT = str(Path(lmcache.__file__).parent)


def interrupted_at(moment: int, call: Callable[[], object], *, root: str = _ROOT) -> bool:
    """Runs `call` in the main thread, with a SIGINT at one of the moments at which Python runs signal handlers.

    These are the beginnings of functions, the ends of calls of built-in ones, and backward jumps, which are not counted here. Not
    every line is one: no handler runs between the acquisition of a lock and the block that releases it.

    Args:
        moment: number of the moment, from 1 on, in code below the folder `root`.

    Returns:
        False if the call has fewer moments.
    """
    left = moment

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(root):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    before = sys.getprofile()
    with ctrl_c_raises():
        sys.setprofile(profile)
        try:
            call()
        except KeyboardInterrupt:
            if left > 0:
                raise
        finally:
            sys.setprofile(before)
    return left <= 0


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Makes SIGINT raise KeyboardInterrupt in the main thread, as it does by default; test runners may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
