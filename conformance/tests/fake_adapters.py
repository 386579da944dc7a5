"""Engine adapters without an engine: one that behaves, and one with a choice of misbehaviours."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmcache_conformance.contract import Capabilities, Request, Response, Session, SessionConfig


class FakeSession:
    """Responds with the reversed prompt. A repeated prompt is a hit."""

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.seen: set[tuple[int, ...]] = set()

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        return [self.answer(request, reuse) for request in requests]

    def answer(self, request: Request, reuse: bool) -> Response:
        cached = {"dram": len(request.tokens)} if reuse and request.tokens in self.seen else {}
        self.seen.add(request.tokens)
        tokens = request.tokens[::-1][: request.max_new_tokens]
        return Response(tokens=tokens, logprobs=(b"\x00\xff\x80",), logprob=(-0.5,), cached=cached)

    def forget_splits(self) -> None:
        self.seen.clear()

    def drop_device_cache(self) -> None: ...

    def flush(self) -> None:
        print("flushed: this goes to stdout and must not disturb the protocol")

    def clear(self, salt: str | None = None) -> None:
        self.seen.clear()

    def stats(self) -> Mapping[str, float]:
        return {"seen": float(len(self.seen)), "pid": float(os.getpid())}

    def close(self) -> None:
        if folder := self.config.options.get("closed"):
            Path(folder).write_text("closed")


class Good:
    name = "good"
    capabilities = Capabilities(restart=True, dtypes=("float32", "bfloat16"))

    def why_not(self) -> str | None:
        return None

    def open(self, config: SessionConfig) -> Session:
        return FakeSession(config)


good = Good()


class Absent(Good):
    def why_not(self) -> str | None:
        return "fake-engine 1.0 is too old"


absent = Absent()


class _Misbehaves(FakeSession):
    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        print("engine: about to misbehave", file=sys.stderr, flush=True)
        how = str(self.config.options["how"])
        return getattr(self, how)(requests)  # type: ignore[no-any-return]

    def raises(self, requests: Sequence[Request]) -> list[Response]:
        raise KeyError("no such block")

    def exits(self, requests: Sequence[Request]) -> list[Response]:
        os._exit(3)

    def sys_exits(self, requests: Sequence[Request]) -> list[Response]:
        sys.exit("scheduler failed")

    def segfaults(self, requests: Sequence[Request]) -> list[Response]:
        ctypes.string_at(0)
        raise AssertionError

    def hangs(self, requests: Sequence[Request]) -> list[Response]:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        while True:
            time.sleep(1)

    def dies_leaving_a_child(self, requests: Sequence[Request]) -> list[Response]:
        if os.fork() == 0:  # holds every pipe open
            time.sleep(600)
        os._exit(9)

    def babbles(self, requests: Sequence[Request]) -> list[Response]:
        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(fd, b"WARNING: this is not a message\n" * 2)
        time.sleep(600)
        return []

    def one_too_few(self, requests: Sequence[Request]) -> list[Response]:
        return [Response()] * (len(requests) - 1)

    def wrong_types(self, requests: Sequence[Request]) -> list[Response]:
        return [Response(tokens=("a",))] * len(requests)  # type: ignore[arg-type]

    def unserialisable(self, requests: Sequence[Request]) -> list[Response]:
        return [object()]  # type: ignore[list-item]


class Bad(Good):
    def open(self, config: SessionConfig) -> Session:
        if config.options.get("how") == "fails to open":
            raise OSError("no device")
        return _Misbehaves(config)


bad = Bad()
not_an_adapter = 7
