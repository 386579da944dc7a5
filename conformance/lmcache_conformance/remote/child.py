"""The test's side of a session in a child process.

Whatever the engine does there (crash, hang, raise, write garbage, kill its process tree) is raised in the test as an
`EngineFailure`, within the timeout, and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import msgspec

from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.remote.frames import (
    BadFrameError,
    Call,
    FrameTimeoutError,
    Open,
    Raised,
    Returned,
    receive,
    send,
)
from lmcache_conformance.runner.failures import (
    EngineDied,
    EngineFailure,
    EngineHung,
    EngineMisanswered,
    EngineRaised,
    ending,
)
from lmcache_conformance.runner.processes import kill_group

__all__ = ["EngineDied", "EngineFailure", "EngineHung", "EngineMisanswered", "EngineRaised", "RemoteSession"]

TAIL_CHARS = 6_000
_STACKS_S = 1.0
"""How long a hung process gets to print the stacks of its threads."""

_EXIT_S = 10.0
"""How long a process may take to end after it has closed its session."""


class Process(Protocol):
    """The part of `subprocess.Popen` that a session needs."""

    pid: int

    def poll(self) -> int | None:
        """Returns the exit status; None while the process runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the process to end and returns its exit status; raises `subprocess.TimeoutExpired`."""
        ...


class RemoteSession:
    """A `Session` in its own child process and process group. Use it as a context manager.

    Args:
        adapter: entry point name or `module:attribute`.
        config: passed to `EngineAdapter.open`.
        timeout_s: for each call.
        start_timeout_s: for opening; importing an engine from a slow disk can take minutes.
        environment: variables added to those of this process.
        folder: the child's working directory; by default this process's.

    Raises:
        EngineDied, EngineHung, EngineRaised: the session could not be opened.
    """

    def __init__(
        self,
        adapter: str,
        config: SessionConfig,
        *,
        timeout_s: float = 300.0,
        start_timeout_s: float = 600.0,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.adapter = adapter
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # a file, because a pipe that is not read fills up
        self._in, child_out = os.pipe()
        child_in, self._out = os.pipe()
        path = tuple(os.path.abspath(entry) for entry in sys.path)
        try:
            self._process = self._spawn(child_in, child_out, environment or {}, folder)
        except BaseException:
            self._release()
            raise
        finally:
            os.close(child_in)
            os.close(child_out)
        try:
            self._ask("open", Open(adapter, config, path), start_timeout_s)
        except BaseException:
            self.kill9()
            raise

    def _spawn(self, inbox: int, outbox: int, environment: Mapping[str, str], folder: Path | None) -> Process:
        """Starts the child in its own process group; it reads calls from `inbox` and writes results to `outbox`."""
        here = str(Path(__file__).parents[2])
        return subprocess.Popen(
            # -c rather than -m, so that the folder from which this package was imported need not be on PYTHONPATH
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.append({here!r}); from lmcache_conformance.remote.serve import main; main()",
                str(inbox),
                str(outbox),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=(inbox, outbox),
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            cwd=folder,
        )

    @property
    def pid(self) -> int:
        """The child's process id, which is also its process group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    # ---------------------------------------------------------------- the session's methods

    def generate(
        self, requests: Sequence[Request], *, reuse: bool = True, timeout_s: float | None = None
    ) -> list[Response]:
        """See `Session.generate`. Checks the number and types of the responses, not their content.

        Raises:
            EngineMisanswered: fewer or more responses than requests, or values of wrong types.
        """
        call = f"generate({len(requests)} requests, reuse={reuse})"
        value = self._call("generate", {"requests": list(requests), "reuse": reuse}, call, timeout_s)
        try:
            responses = msgspec.convert(value, list[Response])
        except msgspec.ValidationError as error:
            what = f"the result is not a list of responses: {error}"
            raise EngineMisanswered(self.adapter, call, what, self.stderr()) from None
        if len(responses) != len(requests):
            what = f"{len(responses)} responses to {len(requests)} requests"
            raise EngineMisanswered(self.adapter, call, what, self.stderr())
        return responses

    def forget_splits(self) -> None:
        """See `Session.forget_splits`."""
        self._call("forget_splits", {})

    def drop_device_cache(self) -> None:
        """See `Session.drop_device_cache`."""
        self._call("drop_device_cache", {})

    def flush(self) -> None:
        """See `Session.flush`."""
        self._call("flush", {})

    def clear(self, salt: str | None = None) -> None:
        """See `Session.clear`."""
        self._call("clear", {"salt": salt})

    def stats(self) -> Mapping[str, float]:
        """See `Session.stats`."""
        value = self._call("stats", {})
        try:
            return msgspec.convert(value, dict[str, float])
        except msgspec.ValidationError as error:
            what = f"the result is not a mapping of names to numbers: {error}"
            raise EngineMisanswered(self.adapter, "stats", what, self.stderr()) from None

    def close(self) -> None:
        """Closes the session and waits until its process has ended. Idempotent.

        Raises:
            EngineDied, EngineHung, EngineRaised: closing failed; the process has ended nevertheless.
        """
        if self._closed:
            return
        try:
            if self.alive:
                self._call("close", {})
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_EXIT_S)
        finally:
            self.kill9()

    def kill9(self) -> None:
        """Kills the process and its children at once, like `kill -9` or the out-of-memory killer. Idempotent.

        May be called while another thread waits for a result; that call then raises `EngineDied`.
        """
        if self._closed:
            return
        self._kill_group()
        if self._lock.acquire(timeout=_EXIT_S):
            try:
                self._release()
            finally:
                self._lock.release()

    def stderr(self) -> str:
        """Returns the end of what the engine wrote to stderr and stdout."""
        if self._stderr.closed:
            return ""
        fd = self._stderr.fileno()
        size = os.fstat(fd).st_size
        start = max(0, size - TAIL_CHARS)
        return os.pread(fd, size - start, start).decode(errors="replace")

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.kill9()  # an error while closing would hide the first error

    # ---------------------------------------------------------------- one call

    def _call(
        self, method: str, arguments: dict[str, Any], call: str | None = None, timeout_s: float | None = None
    ) -> Any:
        return self._ask(call or method, Call(method, arguments), timeout_s or self.timeout_s)

    def _ask(self, call: str, message: Open | Call, timeout_s: float) -> Any:
        with self._lock:
            if self._closed:
                raise EngineDied(self.adapter, call, "the session was closed or killed before", "")
            try:
                send(self._out, message)
                answer = receive(self._in, Returned | Raised, timeout_s=timeout_s, alive=lambda: self.alive)
            except FrameTimeoutError:
                self._hung(call, timeout_s)
            except (EOFError, BrokenPipeError):
                self._died(call)
            except BadFrameError as error:
                self._kill_group()
                raise EngineDied(
                    self.adapter, call, f"its process wrote into the suite's pipe: {error}", self.stderr()
                ) from None
        if isinstance(answer, Raised):
            what = f"raised {answer.error}: {answer.message}\n{answer.traceback.rstrip()}"
            raise EngineRaised(self.adapter, call, what, self.stderr(), answer.error)
        return answer.value

    def _hung(self, call: str, timeout_s: float) -> NoReturn:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(_STACKS_S)
        self._kill_group()
        what = f"no answer within {timeout_s:g} s; its process and all children were killed"
        raise EngineHung(self.adapter, call, what, self.stderr())

    def _died(self, call: str) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STACKS_S)
        status = self._process.poll()
        self._kill_group()
        raise EngineDied(self.adapter, call, f"its process {ending(status)}", self.stderr())

    def _kill_group(self) -> None:
        kill_group(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)

    def _release(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._in)
            os.close(self._out)
            self._stderr.close()
