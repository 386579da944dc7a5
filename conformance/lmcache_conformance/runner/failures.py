"""What can become of an engine in a child process, as typed errors. Each ends with the last lines it wrote to stderr."""

from __future__ import annotations

import signal


class EngineFailure(Exception):  # noqa: N818
    """Base: the engine failed the call, not the test that made it. `call` names the session's method."""

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
    """The process ended, or no longer speaks the protocol."""


class EngineHung(EngineFailure):
    """No answer in time. The process and its children were killed."""


class EngineRaised(EngineFailure):
    """The adapter raised. The session goes on, unless it was being opened.

    Attributes:
        error: the exception's class name, e.g. `ValueError`.
    """

    def __init__(self, adapter: str, call: str, what: str, stderr: str, error: str) -> None:
        super().__init__(adapter, call, what, stderr)
        self.error = error


class EngineMisanswered(EngineFailure):
    """The answer is not what the contract says: not one response per request, or of the wrong types."""


def ending(status: int | None) -> str:
    """How a process with this `returncode` ended, in words."""
    if status is None:
        return "closed its end of the pipe"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
