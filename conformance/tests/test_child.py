"""Whatever an engine does in its process is raised as a typed failure, in time, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.remote.child import (
    EngineDied,
    EngineFailure,
    EngineHung,
    EngineMisanswered,
    EngineRaised,
    RemoteSession,
)
from lmcache_conformance.runner.processes import members

HERE = Path(__file__).parent
ASK = [Request(tokens=(1, 2, 3)), Request(tokens=(4, 5))]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def opened(how: str = "", adapter: str = "bad", timeout_s: float = 60.0, **more: object) -> RemoteSession:
    config = SessionConfig(model="none", options={"how": how, **more})
    return RemoteSession(f"fake_adapters:{adapter}", config, timeout_s=timeout_s)


def test_a_session_answers_as_it_would_in_this_process(tmp_path: Path) -> None:
    with opened(adapter="good", closed=str(tmp_path / "closed")) as session:
        first = session.generate(ASK)
        assert first[0] == Response(tokens=(3, 2, 1), logprobs=(b"\x00\xff\x80",), logprob=(-0.5,), cached={})
        assert [r.hit for r in session.generate(ASK)] == [3, 2]
        assert [r.hit for r in session.generate(ASK, reuse=False)] == [0, 0]
        session.flush()
        assert "must not disturb the protocol" in session.stderr()
        session.drop_device_cache()
        session.forget_splits()
        assert session.stats()["seen"] == 0
        session.generate(ASK)
        session.clear("tenant")
        assert session.stats() == {"seen": 0.0, "pid": float(session.pid)}
        assert session.pid != os.getpid()
    assert (tmp_path / "closed").read_text() == "closed"
    assert not session.alive
    assert members(session.pid) == []
    session.close()  # idempotent
    with pytest.raises(EngineDied, match="closed or killed before"):
        session.generate(ASK)


def test_an_exception_is_reported_with_its_traceback_and_the_session_stays_open() -> None:
    with opened("raises") as session:
        with pytest.raises(EngineRaised) as caught:
            session.generate(ASK)
        assert caught.value.error == "KeyError"
        text = str(caught.value)
        for part in ("fake_adapters:bad", "generate(2 requests, reuse=True)", "no such block", "in raises", "about to"):
            assert part in text
        assert session.stats()["seen"] == 0


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("exits", EngineDied, "ended with exit status 3"),
        ("segfaults", EngineDied, "was killed by SIGSEGV"),
        ("dies_leaving_a_child", EngineDied, "ended with exit status 9"),
        ("babbles", EngineDied, "wrote into the suite's pipe"),
        ("sys_exits", EngineRaised, "SystemExit: scheduler failed"),
        ("one_too_few", EngineMisanswered, "1 responses to 2 requests"),
        ("wrong_types", EngineMisanswered, "Expected `int`, got `str`"),
        ("unserialisable", EngineRaised, "Encoding objects of type object is unsupported"),
    ],
)
def test_misbehaviour_is_a_typed_failure_with_the_end_of_stderr(
    how: str, kind: type[EngineFailure], message: str
) -> None:
    with opened(how) as session:
        with pytest.raises(kind) as caught:
            session.generate(ASK)
        assert message in str(caught.value)
        assert "engine: about to misbehave" in caught.value.stderr
        assert caught.value.call.startswith("generate")
        session.kill9()
    assert members(session.pid) == []


def test_a_crash_is_reported_with_the_stack() -> None:
    with opened("segfaults") as session, pytest.raises(EngineDied, match=r"(?s)Segmentation fault.*in segfaults"):
        session.generate(ASK)


def test_a_hang_ends_in_time_with_its_stack_and_its_children_are_killed() -> None:
    session = opened("hangs", timeout_s=2)
    with pytest.raises(EngineHung, match=r"(?s)no answer within 2 s.*in hangs"):
        session.generate(ASK)
    assert members(session.pid) == []
    session.kill9()


def test_kill9_from_another_thread_ends_the_call_and_the_group() -> None:
    session = opened("hangs")
    failures: list[EngineFailure] = []

    def ask() -> None:
        try:
            session.generate(ASK)
        except EngineFailure as failure:
            failures.append(failure)

    thread = threading.Thread(target=ask)
    thread.start()
    while len(members(session.pid)) < 2:  # once it has started its child, it is inside the call
        time.sleep(0.02)
    session.kill9()
    thread.join(60)
    assert not thread.is_alive()
    assert members(session.pid) == []
    assert isinstance(failures[0], EngineDied)
    assert "SIGKILL" in str(failures[0])
    session.kill9()


def test_a_failed_open_is_reported_and_leaves_no_process() -> None:
    before = set(os.listdir("/proc"))
    with pytest.raises(EngineRaised, match=r"(?s)open: raised OSError: no device.*in open"):
        opened("fails to open")
    with pytest.raises(EngineRaised, match=r"not installed here: fake-engine 1\.0 is too old"):
        opened(adapter="absent")
    with pytest.raises(EngineRaised, match="lacks name, capabilities, why_not, open"):
        opened(adapter="not_an_adapter")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not set(children) - before


def test_an_error_in_the_test_kills_the_session() -> None:
    with pytest.raises(ZeroDivisionError), opened(adapter="good") as session:
        raise ZeroDivisionError
    assert members(session.pid) == []


def test_when_the_tests_own_process_is_killed_the_engine_ends_too(tmp_path: Path) -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:  # a test run that is killed while its engine computes
        try:
            session = opened("hangs")
            os.write(write, str(session.pid).encode())
            session.generate(ASK)
        finally:
            os._exit(0)
    os.close(write)
    group = int(os.read(read, 100))
    os.close(read)
    while len(members(group)) < 2:
        time.sleep(0.02)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while members(group):
        time.sleep(0.02)
