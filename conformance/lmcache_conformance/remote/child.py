"""The test's side of a session that runs in a process of its own.

Whatever the engine does there (crash, hang, raise, write rubbish, kill its process tree) comes back as one of
`failures.EngineFailure`, in time, and leaves no process behind.
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
from typing import Any, NoReturn

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
"""How long a hung process gets to write where its threads are."""

_EXIT_S = 10.0
"""How long a process may take to end after it has closed its session."""


class RemoteSession:
    """A `Session` in a child process and process group of its own. Use it as a context manager.

    Args:
        adapter: entry point name or `module:attribute`.
        config: passed to `EngineAdapter.open`.
        timeout_s: for each call.
        start_timeout_s: for opening: importing an engine on a slow disk takes minutes.
        environment: variables on top of this process's.
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
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # a file never fills up, as a pipe nobody reads would
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._in, self._out = ours_in, ours_out
        here = str(Path(__file__).parents[2])
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        try:
            self._process = subprocess.Popen(
                # -c and not -m: works wherever this package was imported from, its folder need not be on PYTHONPATH
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path.append({here!r}); from lmcache_conformance.remote.serve import main; main()",
                    str(theirs_in),
                    str(theirs_out),
                ],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
                env=env,
                cwd=folder,
            )
        except BaseException:
            self._release()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        path = tuple(os.path.abspath(entry) for entry in sys.path)
        try:
            self._ask("open", Open(adapter, config, path), start_timeout_s)
        except BaseException:
            self.kill9()
            raise

    @property
    def pid(self) -> int:
        """The child's process id, also that of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """The process runs."""
        return self._process.poll() is None

    # ---------------------------------------------------------------- the session's methods

    def generate(
        self, requests: Sequence[Request], *, reuse: bool = True, timeout_s: float | None = None
    ) -> list[Response]:
        """See `Session.generate`. One response per request is checked here, what they say is not.

        Raises:
            EngineMisanswered: fewer or more responses than requests, or values of the wrong types.
        """
        call = f"generate({len(requests)} requests, reuse={reuse})"
        value = self._call("generate", {"requests": list(requests), "reuse": reuse}, call, timeout_s)
        try:
            responses = msgspec.convert(value, list[Response])
        except msgspec.ValidationError as error:
            what = f"the answer is no list of responses: {error}"
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
            what = f"the answer is no table of numbers: {error}"
            raise EngineMisanswered(self.adapter, "stats", what, self.stderr()) from None

    def close(self) -> None:
        """Close the session, and wait until its process has ended. Idempotent.

        Raises:
            EngineDied, EngineHung, EngineRaised: it went wrong; the process is gone all the same.
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
        """End the process and all it has started, at once, as kill −9 or the out-of-memory killer would. Idempotent.

        May be called while another thread waits for an answer; that call raises `EngineDied`.
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
        """The last lines that the engine wrote."""
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
            self.kill9()  # what went wrong first is what the reader should see

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
                    self.adapter, call, f"its process wrote into our pipe: {error}", self.stderr()
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
        what = f"no answer within {timeout_s:g} s; it and its children were killed"
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
