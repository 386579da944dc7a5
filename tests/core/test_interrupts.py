"""Signal handlers around functions that change state. Real signals, real handlers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from lmcache.interrupts import deliver, uninterrupted


class Stop(BaseException):
    """What the handler of these tests raises."""


def stop(signum: int, frame: FrameType | None) -> None:
    raise Stop(signum)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGUSR1, before[1])


def test_a_handler_runs_when_the_outermost_function_has_returned() -> None:
    done = []

    @uninterrupted
    def inner() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("inner")

    @uninterrupted
    def outer() -> None:
        inner()
        done.append("outer")

    with pytest.raises(Stop):
        outer()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is stop
    assert outer.__name__ == "outer"


def test_a_handler_runs_earlier_where_that_is_allowed() -> None:
    done = []

    @uninterrupted
    def wait() -> None:
        signal.raise_signal(signal.SIGUSR1)
        done.append("before")
        deliver()
        done.append("after")

    with pytest.raises(Stop):
        wait()
    assert done == ["before"]
    assert signal.getsignal(signal.SIGUSR1) is stop


def test_all_signals_are_delivered_and_handlers_that_do_not_raise_change_nothing() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
    signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append(signum))

    @uninterrupted
    def work() -> str:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
        assert not seen
        return "result"

    assert work() == "result"
    assert seen == [signal.SIGUSR1, signal.SIGINT]


def test_exceptions_and_ignored_signals_pass_as_ever() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    @uninterrupted
    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_change_no_handlers() -> None:
    inside, leave = threading.Event(), threading.Event()

    @uninterrupted
    def work() -> None:
        inside.set()
        leave.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    try:
        assert signal.getsignal(signal.SIGINT) is stop
        with pytest.raises(Stop):
            signal.raise_signal(signal.SIGINT)
    finally:
        leave.set()
        thread.join()
