"""The child's side: opens one session and serves calls until `close`. Started by `child.RemoteSession` as

    python -m lmcache_conformance.remote.serve READ_FD WRITE_FD

Whatever the engine prints goes to stderr; messages use their own pipes.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

import msgspec

from lmcache_conformance.contract import Request, Session
from lmcache_conformance.remote.frames import BadFrameError, Call, Open, Raised, Returned, receive, send

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "generate": {"requests": list[Request], "reuse": bool},
    "forget_splits": {},
    "drop_device_cache": {},
    "flush": {},
    "clear": {"salt": str | None},
    "stats": {},
    "close": {},
}
"""The session's methods, with the types of their arguments."""


def main() -> None:
    """Serves one session."""
    inbox, outbox = int(sys.argv[1]), int(sys.argv[2])
    for fd in (inbox, outbox):
        os.set_inheritable(fd, False)  # or the engine's children would keep the pipe open after its death
    os.dup2(2, 1)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent sends it to a hung process, for its stacks
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox, calls), daemon=True).start()
    _serve(calls, outbox)
    sys.stderr.flush()
    os._exit(0)  # the session is closed; threads that the engine left behind must not delay the test


def _listen(inbox: int, calls: queue.SimpleQueue[Any]) -> None:
    """Forwards messages to `calls`. When the test's process ends, kills this process and all that the engine started."""
    try:
        while True:
            calls.put(receive(inbox, Open | Call))
    except EOFError:
        pass
    except BadFrameError as error:
        print(f"lmcache_conformance.remote.serve: {error}", file=sys.stderr, flush=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _serve(calls: queue.SimpleQueue[Any], outbox: int) -> None:
    session: Session | None = None
    while True:
        message = calls.get()
        try:
            if isinstance(message, Open):
                session = _open(message)
                value: Any = None
            else:
                value = _call(session, message)
            send(outbox, Returned(value))
        except BrokenPipeError:
            return
        except BaseException as error:
            send(outbox, Raised(type(error).__name__, str(error), traceback.format_exc()))
            if session is None:
                return
        if isinstance(message, Call) and message.method == "close":
            return


def _open(message: Open) -> Session:
    from lmcache_conformance.runner.discover import find_adapter

    sys.path += [entry for entry in message.path if entry not in sys.path]
    adapter = find_adapter(message.adapter)
    reason = adapter.why_not()
    if reason is not None:
        raise RuntimeError(f"not installed here: {reason}")
    return adapter.open(message.config)


def _call(session: Session | None, message: Call) -> Any:
    if session is None:
        raise RuntimeError("no session is open")
    types = _ARGUMENTS[message.method]
    arguments = {name: msgspec.convert(value, types[name]) for name, value in message.arguments.items()}
    return getattr(session, message.method)(**arguments)


if __name__ == "__main__":
    main()
