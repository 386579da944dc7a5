"""Events of a test run, from pytest to the runner: JSON lines, one event each, readable while the tests still run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Outcome = Literal["passed", "failed", "skipped", "xfailed"]

UNMARKED = "other"
"""The level in reports of tests without a level mark."""


class Began(msgspec.Struct, frozen=True, tag="began", tag_field="event"):
    """Tests were collected; `total` of them will run."""

    total: int


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event"):
    """A test begins. If no `TestResult` follows, the test crashed the process or hung."""

    nodeid: str
    level: str
    command: str
    seed: int | None = None


class TestResult(msgspec.Struct, frozen=True, kw_only=True, tag="result", tag_field="event"):
    """How one test ended.

    Attributes:
        nodeid: pytest's id of the test.
        level: one of `Level`, or `UNMARKED`.
        outcome: a strict xfail that passes is `failed`.
        reason: why the test was skipped or is expected to fail.
        seconds: duration, including set-up and tear-down.
        message: a failed test's message, one paragraph.
        detail: the full failure report, with captured output.
        by_assertion: the test failed by assertion, not because it could not be carried out.
        command: reproduces the result, from the folder in which pytest ran.
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
    """pytest ended regularly, with this exit status."""

    status: int


Event = Began | Started | TestResult | Ended

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Event)


class Writer:
    """Appends events to a file, each in a single write, so that a reader sees at most one incomplete line, the last."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, event: Event) -> None:
        """Appends one line."""
        self._file.write(_ENCODER.encode(event) + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def decode(line: bytes) -> Event:
    """Decodes one line.

    Raises:
        msgspec.DecodeError: the line is not an event.
    """
    event: Event = _DECODER.decode(line)
    return event


def read(path: Path) -> list[Event]:
    """Returns the events of a report file; ignores an incomplete last line, as left by a crash."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [decode(line) for line in lines[:-1] if line]
