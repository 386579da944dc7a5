"""Sessions forked from a process that has already imported the engine, so that they start in a fraction of the time.

For adapters with an attribute `preload`: a module that may be imported before forking. A fork inherits its parent's hash
seed and imported modules; tests that need a truly new process use `RemoteSession` itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any
from unittest import mock

from lmcache_conformance.contract import SessionConfig
from lmcache_conformance.remote.child import Process, RemoteSession


class _ForkedProcess:
    """A `multiprocessing` process with the interface of `subprocess.Popen` that `RemoteSession` needs."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired("session", timeout or 0.0)
        return self._process.exitcode


class ForkedSession(RemoteSession):
    """A `RemoteSession` forked from a server process that has imported the module `preload`."""

    def __init__(
        self,
        adapter: str,
        config: SessionConfig,
        *,
        preload: str,
        timeout_s: float = 300.0,
        start_timeout_s: float = 600.0,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._preload = preload
        super().__init__(
            adapter,
            config,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            environment=environment,
            folder=folder,
        )

    def _spawn(self, inbox: int, outbox: int, environment: Mapping[str, str], folder: Path | None) -> Process:
        files = (DupFd(inbox), DupFd(outbox), DupFd(self._stderr.fileno()))
        process = get_context("forkserver").Process(
            target=_serve, args=(*files, dict(environment), str(folder or os.getcwd())), daemon=False
        )
        _start(process, self._preload)
        return _ForkedProcess(process)


_starting = threading.Lock()


@cache
def _server(preload: str) -> forkserver.ForkServer:
    """Returns the fork server of a module.

    Each module has its own: a process forked from another engine's server would import its engine anew, in an environment
    that the import of the other engine has changed.
    """
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preload])
    return server


def _start(process: BaseProcess, preload: str) -> None:
    """Forks the process from that module's server, which is started on first use."""
    connect = _server(preload).connect_to_new_process
    # `multiprocessing` supports a single server, which it finds by this name.
    with _starting, mock.patch.object(forkserver, "connect_to_new_process", connect):
        process.start()


def _serve(inbox: Any, outbox: Any, errors: Any, environment: dict[str, str], folder: str) -> None:
    """Runs in the forked process: sets up what `RemoteSession._spawn` passes to a new process, then runs the same program."""
    os.setsid()
    read, write, stderr = inbox.detach(), outbox.detach(), errors.detach()
    os.dup2(stderr, 2)
    os.environ.update(environment)
    tempfile.tempdir = None
    os.chdir(folder)
    sys.argv = ["serve", str(read), str(write)]
    from lmcache_conformance.remote.serve import main

    main()
