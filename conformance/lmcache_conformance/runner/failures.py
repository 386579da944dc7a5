"""Failures of an engine in a child process, as typed errors. Each message ends with the engine's last lines of stderr."""

from __future__ import annotations

import signal


class EngineFailure(Exception):  # noqa: N818
    """Base class: the engine failed during a call. `call` names the session's method."""

    def __init__(self, adapter: str, call: str, what: str, stderr: str) -> None:
        self.adapter = adapter
        self.call = call
        self.what = what
        self.stderr = stderr
        tail = (
            f"\n--- last lines of its stderr ---\n{stderr.rstrip()}"
            if stderr.strip()
            else "; it wrote nothing to stderr"
        )
        super().__init__(f"adapter {adapter!r}, {call}: {what}{tail}")


class EngineDied(EngineFailure):
    """The process ended, or wrote invalid messages."""


class EngineHung(EngineFailure):
    """The call did not return in time. The process and its children were killed."""


class EngineRaised(EngineFailure):
    """The adapter raised an exception. The session stays open, unless the exception occurred while opening it.

    Attributes:
        error: the exception's class name, e.g. `ValueError`.
    """

    def __init__(self, adapter: str, call: str, what: str, stderr: str, error: str) -> None:
        super().__init__(adapter, call, what, stderr)
        self.error = error


class EngineMisanswered(EngineFailure):
    """The result violates the contract: a wrong number of responses, or wrong types."""


def ending(status: int | None) -> str:
    """Describes how a process with this `returncode` ended."""
    if status is None:
        return "closed its end of the pipe"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
