"""Offered loads that fail, and schedulers and workers that raise: nothing hangs or loops, every response is correct."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import structs

pytest.importorskip("vllm", reason="vllm is not installed")

from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.engines.forked import ForkedSession
from lmcache_conformance.labs.models import model_folder, vocabulary
from lmcache_conformance.remote.child import RemoteSession
from lmcache_vllm.worker import slots_of

CHUNK = 32
PATIENCE_S = 60.0
"""Seconds before a test fails: a request whose load is never reported waits forever."""

MODELS = ("llama", "gemma3")
"""One KV group, and several: vLLM takes failed loads by block in the first case, by request in the second."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@contextmanager
def engine(model: str, connector: str, policy: str = "recompute", disk: Path | None = None) -> Iterator[RemoteSession]:
    """Opens a session with a connector of `lmcache_vllm.testing.broken`."""
    cache = {"chunk_tokens": CHUNK, "dram_bytes": "64MiB", **({"disk_path": str(disk)} if disk else {})}
    options = {"connector": f"lmcache_vllm.testing.broken:{connector}", "kv_load_failure_policy": policy}
    config = SessionConfig(model=str(model_folder(model)), cache=cache, options=options)
    with ForkedSession(
        "lmcache_vllm.testing.conformance:adapter", config, preload="lmcache_vllm.testing.preload", timeout_s=PATIENCE_S
    ) as session:
        yield session


def prompts(model: str, count: int, chunks: int = 5) -> list[Request]:
    rng = random.Random(7)
    return [
        Request(tokens=tuple(rng.choices(vocabulary(model), k=chunks * CHUNK + 3 + n)), max_new_tokens=12)
        for n in range(count)
    ]


def ask(session: RemoteSession, requests: Sequence[Request]) -> list[Response]:
    """Runs the requests at once, with an empty prefix cache in vLLM."""
    session.drop_device_cache()
    return session.generate(requests)


def counted(session: RemoteSession, *names: str) -> list[int]:
    """Returns counts of the index."""
    stats = session.stats()
    return [int(stats.get(f"index_{name}", 0)) for name in names]


def right(got: Sequence[Response], want: Sequence[Response]) -> None:
    """Checks the responses. In float32, full hits, partial hits and misses give the same greedy tokens."""
    assert [response.error for response in got] == [""] * len(want)
    assert [response.tokens for response in got] == [response.tokens for response in want]


# ---------------------------------------------------------------- loads that fail


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("connector", ["LosesFirst", "LosesMiddle"])
def test_a_load_that_fails_is_computed_anew_and_not_offered_again(model: str, connector: str) -> None:
    requests = prompts(model, 3)
    with engine(model, connector) as session:
        first = [ask(session, [request])[0] for request in requests]
        assert counted(session, "loads") == [0]
        for round in range(1, 3):
            for request, answer in zip(requests, first, strict=True):
                [again] = ask(session, [request])
                right([again], [answer])
                assert again.hit > 0, "nothing was offered: the test shows nothing"
            assert counted(session, "loads", "failed_loads") == [round * len(requests)] * 2, "not one load per request"
        right(ask(session, requests), first)
        assert counted(session, "failed_loads", "jobs", "leases") == [3 * len(requests), 0, 0]


@pytest.mark.parametrize("model", MODELS)
def test_after_a_load_that_failed_later_requests_hit_again(model: str) -> None:
    requests = prompts(model, 2)
    with engine(model, "LosesOnce") as session:
        first = [ask(session, [request])[0] for request in requests]
        for _ in range(3):
            right(ask(session, requests), first)
        again = ask(session, requests)
        assert [response.hit for response in again] == [5 * CHUNK] * 2
        assert counted(session, "loads", "failed_loads") == [8, 1]


@pytest.mark.parametrize("model", MODELS)
def test_with_the_policy_fail_one_request_ends_with_an_error_and_no_other(model: str) -> None:
    requests = prompts(model, 3)
    with engine(model, "LosesOnce", policy="fail") as session:
        first = [ask(session, [request])[0] for request in requests]
        got = ask(session, requests)
        [lost] = [number for number, response in enumerate(got) if response.error]
        assert "error" in got[lost].error
        right([r for r in got if not r.error], [first[n] for n in range(3) if n != lost])
        for _ in range(2):
            right(ask(session, requests), first)
        assert counted(session, "failed_loads") == [1]


@pytest.mark.parametrize("model", MODELS)
def test_an_offer_that_is_gone_when_it_is_taken_up_is_computed_anew(model: str) -> None:
    requests = prompts(model, 2)
    with engine(model, "ForgetsLeases") as session:
        first = [ask(session, [request])[0] for request in requests]
        for _ in range(3):
            again = ask(session, requests)
            right(again, first)
            assert all(response.hit for response in again), "nothing was offered: the test shows nothing"
        assert counted(session, "loads", "leases") == [0, 0]


def test_an_offer_that_is_gone_is_an_error_where_that_is_the_policy() -> None:
    [request, other] = prompts("llama", 2)
    with engine("llama", "ForgetsLeases", policy="fail") as session:
        [first] = ask(session, [request])
        lost, computed = ask(session, [request, other])
        assert "error" in lost.error
        assert not computed.error
        right(ask(session, [structs.replace(request, salt="of its own")]), [first])


# ---------------------------------------------------------------- schedulers and workers that raise


@pytest.mark.parametrize(
    ("model", "connector", "cost"),
    [
        ("llama", "SchedulerRaisesOnce", 1),
        ("llama", "RaisesOnceInAllocated", 1),
        ("gemma3", "RaisesOnceInAllocated", 1),
        ("llama", "RaisesOnceInStore", 0),
        ("llama", "RaisesOnceInView", 1),
        ("gemma3", "RaisesOnceInEnded", 1),
        ("gemma3", "RaisesOnceInStep", 3),
        ("llama", "RaisesOnceInReported", 3),
        ("llama", "RaisesOnceWhileLoading", 3),
    ],
)
def test_an_exception_costs_what_it_concerns_and_nothing_after_it(model: str, connector: str, cost: int) -> None:
    """A request's exception costs its own hit at most; a step's, what is in DRAM and the loads under way."""
    requests = prompts(model, 3)
    with engine(model, connector) as session:
        first = [ask(session, [request])[0] for request in requests]
        before = session.stats().get("lmcache_loaded_tokens_total", 0)
        right(ask(session, requests), first)
        assert session.stats().get("lmcache_loaded_tokens_total", 0) - before >= (3 - cost) * 5 * CHUNK
        assert "broken on purpose" in session.stderr()
        for _ in range(2):
            right(ask(session, requests), first)
        again = ask(session, requests)
        right(again, first)
        assert [response.hit for response in again] == [5 * CHUNK] * 3
        assert counted(session, "jobs", "leases") == [0, 0]


@pytest.mark.parametrize(
    ("model", "connector"), [("llama", "SchedulerRaises"), ("gemma3", "RaisesInAllocated"), ("llama", "RaisesInStep")]
)
def test_a_scheduler_that_raises_again_and_again_is_switched_off(model: str, connector: str) -> None:
    requests = prompts(model, 3)
    with engine(model, connector) as session:
        first = [ask(session, [request])[0] for request in requests]
        for _ in range(4):
            again = ask(session, requests)
            right(again, first)
        assert not any(response.hit for response in again), "hits are still offered"
        assert "broken on purpose" in session.stderr()


@pytest.mark.parametrize(
    ("model", "connector"),
    [
        ("llama", "WorkerRaises"),
        ("gemma3", "WorkerRaises"),
        ("llama", "WorkerRaisesInBind"),
        ("gemma3", "WorkerRaisesInResults"),
    ],
)
def test_behind_a_worker_that_raises_in_a_step_nobody_waits(model: str, connector: str, tmp_path: Path) -> None:
    requests = prompts(model, 3)
    with engine(model, connector, disk=tmp_path / "disk") as session:
        first = [ask(session, [request])[0] for request in requests]
        again = ask(session, requests)
        right(again, first)
        assert all(response.hit for response in again), "nothing was offered: the test shows nothing"
        for _ in range(4):
            again = ask(session, requests)
            right(again, first)
        assert not any(response.hit for response in again), "hits that no worker can load are still offered"
        assert counted(session, "jobs") == [0], "the index still waits for the worker"
        assert "broken on purpose" in session.stderr()


# ---------------------------------------------------------------- what a load must not write


def test_a_load_has_no_slots_in_what_vllm_has_itself_nor_in_the_null_block() -> None:
    """Blocks before `skip` may be shared with other requests; block 0 stands for blocks before a sliding window."""
    slots = slots_of([5, 0, 7, 2], block_tokens=4, tokens=14, skip=2).tolist()
    assert slots == [-1, -1, 22, 23, -1, -1, -1, -1, 28, 29, 30, 31, 8, 9]
    assert slots_of([5], block_tokens=4, tokens=6, skip=0).tolist() == [20, 21, 22, 23, -1, -1]
