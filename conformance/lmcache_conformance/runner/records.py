"""What a run of tests tells the runner: JSON lines, one event each, readable while the tests still run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Outcome = Literal["passed", "failed", "skipped", "xfailed"]

UNMARKED = "other"
"""The level of tests without one."""


class Began(msgspec.Struct, frozen=True, tag="began", tag_field="event"):
    """Tests were collected; `total` of them will run."""

    total: int


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event"):
    """A test begins. One that is never followed by its `TestResult` took the process down, or hung."""

    nodeid: str
    level: str
    command: str
    seed: int | None = None


class TestResult(msgspec.Struct, frozen=True, kw_only=True, tag="result", tag_field="event"):
    """How one test ended.

    Attributes:
        nodeid: the test, as pytest names it.
        level: what it proves, one of `Level`, or `UNMARKED`.
        outcome: a strict xfail that passes is `failed`.
        reason: why it was skipped, or is expected to fail.
        seconds: set-up and tear-down included.
        message: what a failed test said, one paragraph.
        detail: the whole of it, with what was printed.
        by_assertion: it failed because something checked was untrue, not because the test could not be carried out.
        command: reproduces it, from the folder in which pytest ran.
        seed: Hypothesis' seed.
    """

    __test__ = False

    nodeid: str
    level: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    message: str = ""
    detail: str = ""
    by_assertion: bool = False
    command: str = ""
    seed: int | None = None

    @property
    def case(self) -> str:
        """Class and test, without the file."""
        return self.nodeid.partition("::")[2] or self.nodeid


class Ended(msgspec.Struct, frozen=True, tag="ended", tag_field="event"):
    """pytest came to its regular end, with this exit status."""

    status: int


Event = Began | Started | TestResult | Ended

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Event)


class Writer:
    """Appends events to a file. Each is one write, so that a reader sees whole lines or the beginning of the last one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, event: Event) -> None:
        """Append one line."""
        self._file.write(_ENCODER.encode(event) + b"\n")

    def close(self) -> None:
        """No more events."""
        self._file.close()


def decode(line: bytes) -> Event:
    """One line.

    Raises:
        msgspec.DecodeError: it is not an event.
    """
    event: Event = _DECODER.decode(line)
    return event


def read(path: Path) -> list[Event]:
    """All whole lines of a report; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [decode(line) for line in lines[:-1] if line]
