"""Sessions that fork from a process which has imported the engine already: new processes in a fraction of the time.

For adapters that name a module that may be imported before forking (attribute `preload`). A fork inherits its parent's hash
seed and imported modules, so what depends on a truly new process is tested with `RemoteSession` itself.
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
from lmcache_conformance.remote.child import RemoteSession
from lmcache_conformance.remote.frames import Open


class _Forked:
    """As much of `subprocess.Popen` as `RemoteSession` needs."""

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
    """As `RemoteSession`, which see, but forked from a server that has imported `preload`."""

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
        self.adapter = adapter
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # as there
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._in, self._out = ours_in, ours_out
        path = tuple(os.path.abspath(entry) for entry in sys.path)
        try:
            process = get_context("forkserver").Process(
                target=_serve,
                args=(
                    DupFd(theirs_in),
                    DupFd(theirs_out),
                    DupFd(self._stderr.fileno()),
                    dict(environment or {}),
                    str(folder or os.getcwd()),
                ),
                daemon=False,
            )
            _start(process, preload)
            self._process: Any = _Forked(process)
        except BaseException:
            self._release()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        try:
            self._ask("open", Open(adapter, config, path), start_timeout_s)
        except BaseException:
            self.kill9()
            raise


_starting = threading.Lock()


@cache
def _server(preload: str) -> forkserver.ForkServer:
    """A server for each module: forked from another's, every process would import its engine anew, and run on what the import of
    the other engine has changed.
    """
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preload])
    return server


def _start(process: BaseProcess, preload: str) -> None:
    """Fork it from that module's server, which starts with the first."""
    connect = _server(preload).connect_to_new_process
    # `multiprocessing` knows of one server only, and finds it by this name.
    with _starting, mock.patch.object(forkserver, "connect_to_new_process", connect):
        process.start()


def _serve(inbox: Any, outbox: Any, errors: Any, environment: dict[str, str], folder: str) -> None:
    """The forked process: what `RemoteSession` gives a new one, and then the same program."""
    os.setsid()
    read, write, stderr = inbox.detach(), outbox.detach(), errors.detach()
    os.dup2(stderr, 2)
    os.environ.update(environment)
    tempfile.tempdir = None
    os.chdir(folder)
    sys.argv = ["serve", str(read), str(write)]
    from lmcache_conformance.remote.serve import main

    main()
