"""Streams and events, as little of them as ordering needs. Whoever moves bytes on a device writes it over `Streams`, so that
a test can put a recorder in its place that runs the same calls in any order they allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_NAP_S = 0.0002

Work = Callable[[], object]
Span = tuple[int, int]
"""(address, bytes)."""


@dataclass(frozen=True)
class Touches:
    """The memory that a piece of work reads and writes."""

    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()


class Streams(Protocol):
    """The streams of one device. Work of one stream runs in the order it was launched, that of two in any, unless an event
    orders it. No call but `synchronise` waits.
    """

    def compute(self) -> Any:
        """The stream on which the calling thread's engine computes."""
        ...

    def side(self, name: str) -> Any:
        """A stream of our own; the same one for the same name."""
        ...

    def launch(self, stream: Any, work: Work, touches: Callable[[], Touches]) -> None:
        """Enqueue what `work` enqueues on `stream`. `touches` tells a recorder what it reads and writes; others don't ask."""
        ...

    def record(self, stream: Any) -> Any:
        """An event that happens when all work launched on `stream` so far is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Work launched on `stream` from now on runs after `event`."""
        ...

    def done(self, event: Any) -> bool:
        """Whether it has happened."""
        ...

    def synchronise(self, event: Any) -> None:
        """Let this thread wait until it has happened."""
        ...


class TorchStreams:
    """Streams of a CUDA, ROCm or XPU device, by torch's device-independent interface."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sides: dict[str, torch.Stream] = {}

    def compute(self) -> torch.Stream:
        """See `Streams`."""
        return torch.accelerator.current_stream(self.device)

    def side(self, name: str) -> torch.Stream:
        """See `Streams`."""
        found = self._sides.get(name)
        return found if found is not None else self._sides.setdefault(name, torch.Stream(self.device))

    def launch(self, stream: torch.Stream, work: Work, touches: Callable[[], Touches]) -> None:
        """See `Streams`."""
        with torch.accelerator.device_index(self.device.index), stream:  # entering a current stream selects no device
            work()

    def record(self, stream: torch.Stream) -> torch.Event:
        """See `Streams`."""
        return stream.record_event()

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """See `Streams`."""
        stream.wait_event(event)

    def done(self, event: torch.Event) -> bool:
        """See `Streams`."""
        return bool(event.query())

    def synchronise(self, event: torch.Event) -> None:
        """See `Streams`."""
        while not event.query():  # `synchronize` of such an event keeps a core busy
            time.sleep(_NAP_S)
