"""A minimal interface to streams and events. Device copies are written against `Streams`, so that a test can substitute a
recorder that runs the same calls in any order they allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_POLL_S = 0.0002

Work = Callable[[], object]
Span = tuple[int, int]
"""(address, bytes)."""


@dataclass(frozen=True)
class Touches:
    """The memory ranges that a piece of work reads and writes."""

    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()


class Streams(Protocol):
    """The streams of one device. Work on one stream runs in launch order; work on different streams is ordered only by
    events. Only `synchronise` blocks.
    """

    def compute(self) -> Any:
        """The engine's stream: the current stream of the calling thread."""
        ...

    def side(self, name: str) -> Any:
        """A stream separate from the engine's; the same one for the same name."""
        ...

    def launch(self, stream: Any, work: Work, touches: Callable[[], Touches]) -> None:
        """Runs `work` with `stream` as the current stream. `touches` returns the memory it accesses; only a recorder calls it."""
        ...

    def record(self, stream: Any) -> Any:
        """Records an event that occurs when all work launched on `stream` so far is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Makes work launched on `stream` from now on run after `event`."""
        ...

    def done(self, event: Any) -> bool:
        """Whether the event has occurred."""
        ...

    def synchronise(self, event: Any) -> None:
        """Blocks this thread until the event has occurred."""
        ...


class TorchStreams:
    """Streams of a CUDA, ROCm or XPU device, through torch's device-independent interface."""

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
        with (
            torch.accelerator.device_index(self.device.index),
            stream,
        ):  # entering an already current stream sets no device
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
        while not event.query():  # `event.synchronize` would busy-wait
            time.sleep(_POLL_S)
