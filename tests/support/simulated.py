"""Streams without a device: what is launched runs later, in any order that streams and events allow, and every two accesses
to the same bytes, of which one writes, must be ordered by them.

Order is kept as vector clocks: each stream counts what was launched on it, and knows of every other stream up to which count
its next work is sure to come after. The host is a stream too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache_kernels.streams import Span, Touches, Work

Clock = dict[str, int]


class OrderError(AssertionError):
    """Two accesses to the same bytes that nothing orders."""


@dataclass(eq=False)
class Event:
    """A place in a stream; `clock` is what is known there."""

    stream: str
    clock: Clock
    happened: bool = False


@dataclass
class _Access:
    start: int
    end: int
    writes: bool
    stream: str
    count: int
    what: str


@dataclass
class Simulated:
    """`Streams` for tests.

    Attributes:
        choose: given how many streams could go on, says which one does.
        forget: (stream that waits, stream of the event) pairs whose waits are left out: the mistakes to be found.
    """

    choose: Callable[[int], int] = lambda count: 0
    forget: set[tuple[str, str]] = field(default_factory=set)
    clocks: dict[str, Clock] = field(default_factory=dict)
    queues: dict[str, deque[Work | Event]] = field(
        default_factory=dict
    )  # an event: its own stream's passes, others' wait
    finished: dict[str, int] = field(default_factory=dict)
    accesses: list[_Access] = field(default_factory=list)
    used: set[tuple[str, str]] = field(default_factory=set)

    # ------------------------------------------------------------ `Streams`

    def compute(self) -> str:
        return "compute"

    def side(self, name: str) -> str:
        return name

    def launch(self, stream: str, work: Work, touches: Callable[[], Touches]) -> None:
        clock = self._clock(stream)
        _learn(clock, self._clock("host"))
        clock[stream] = clock.get(stream, 0) + 1
        self._check(stream, clock, touches())
        self.queues.setdefault(stream, deque()).append(work)

    def record(self, stream: str) -> Event:
        event = Event(stream, dict(self._clock(stream)))
        self.queues.setdefault(stream, deque()).append(event)
        return event

    def wait(self, stream: str, event: Event) -> None:
        self.used.add((stream, event.stream))
        if (stream, event.stream) not in self.forget:
            _learn(self._clock(stream), event.clock)
            self.queues.setdefault(stream, deque()).append(event)

    def done(self, event: Event) -> bool:
        self._pass_events()
        return event.happened

    def synchronise(self, event: Event) -> None:
        while not self.done(event):
            assert self.step(), "what is waited for can never happen"
        _learn(self._clock("host"), event.clock)

    # ------------------------------------------------------------ for tests

    def host(self, *, reads: Sequence[Span] = (), writes: Sequence[Span] = ()) -> None:
        """The host touches memory now."""
        clock = self._clock("host")
        clock["host"] = clock.get("host", 0) + 1
        self._check("host", clock, Touches(reads, writes))

    def step(self) -> bool:
        """Run one piece of work that may run; False if there is none."""
        self._pass_events()
        able = [
            name for name in sorted(self.queues) if self.queues[name] and not isinstance(self.queues[name][0], Event)
        ]
        if not able:
            return False
        name = able[self.choose(len(able))]
        work = self.queues[name].popleft()
        assert not isinstance(work, Event)
        work()
        self.finished[name] = self.finished.get(name, 0) + 1
        return True

    def _pass_events(self) -> None:
        moved = True
        while moved:
            moved = False
            for name, queue in self.queues.items():
                while queue and isinstance(queue[0], Event) and (queue[0].stream == name or queue[0].happened):
                    event = queue.popleft()
                    assert isinstance(event, Event)
                    event.happened = True
                    moved = True

    def _clock(self, stream: str) -> Clock:
        return self.clocks.setdefault(stream, {})

    def _check(self, stream: str, clock: Clock, touches: Touches) -> None:
        mine = [(span, False) for span in touches.reads] + [(span, True) for span in touches.writes]
        new = [
            _Access(a, a + n, writes, stream, clock[stream], "writes" if writes else "reads") for (a, n), writes in mine
        ]
        for one in new:
            for other in self.accesses:
                meet = one.start < other.end and other.start < one.end and (one.writes or other.writes)
                if meet and clock.get(other.stream, 0) < other.count:
                    raise OrderError(f"{stream} {one.what} what {other.stream} {other.what}, and nothing orders them")
        self.accesses += new


class Deferred(Simulated):
    """For whole caches with several threads: nothing is checked, and side streams run as late as anybody lets them.

    The engine's own stream is done when a launch returns, as engines in tests compute on the host.
    """

    def __init__(self, choose: Callable[[int], int]) -> None:
        super().__init__(choose)
        self._lock = threading.RLock()

    def launch(self, stream: str, work: Work, touches: Callable[[], Touches]) -> None:
        with self._lock:
            self.queues.setdefault(stream, deque()).append(work)
            if stream == "compute":
                super().synchronise(super().record(stream))

    def record(self, stream: str) -> Event:
        with self._lock:
            return super().record(stream)

    def wait(self, stream: str, event: Event) -> None:
        with self._lock:
            super().wait(stream, event)

    def done(self, event: Event) -> bool:
        with self._lock:
            return super().done(event)

    def synchronise(self, event: Event) -> None:
        with self._lock:
            super().synchronise(event)


def _learn(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)
