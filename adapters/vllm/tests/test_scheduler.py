"""What the connector's scheduler decides, step by step, for workers that execute everything immediately. Without an engine."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from schedulerlab import BLOCK, CHUNK, CHUNKS, Workers, into_engine

from lmcache.plan import Status
from lmcache_conformance.labs.interrupts import ctrl_c_raises
from lmcache_vllm.connector import LMCacheConnector
from lmcache_vllm.messages import Handshake, RankMeta
from lmcache_vllm.worker import ConnectorWorker

# ---------------------------------------------------------------- start-up


def test_offers_that_come_with_reports_open_the_scheduler_and_requests_wait_for_them() -> None:
    workers = Workers(opened=False)
    assert workers.scheduler.get_num_new_matched_tokens(workers.request(0), 0) is None
    workers.step({})
    assert workers.serve(0) == 0
    assert workers.serve(0) == (CHUNKS - 1) * CHUNK, "the first request was not stored"
    assert not workers.step({}).opening


def test_offers_that_never_come_cost_the_cache_and_nobody_waits_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(opened=False)
    workers.offers = workers.offers[:1]  # of another connector's making
    steps = 0
    while workers.scheduler.get_num_new_matched_tokens(workers.request(0), 0) is None:
        workers.step({})
        steps += 1
    assert 2 < steps < 100
    assert "cache-disabled" in caplog.text
    workers.scheduler.open(Handshake.of(offer).read() for offer in workers.offers)
    assert workers.serve(0) == 0


# ---------------------------------------------------------------- whose KV it is


def test_what_another_connector_loads_is_not_stored_until_it_is_computed_here() -> None:
    workers = Workers()
    request = workers.request(0)
    assert workers.ask(request, CHUNK) == 0  # vLLM has one chunk itself
    blocks = workers.allocate(request, 0)
    workers.scheduler.update_state_after_alloc(request, blocks, 0)  # once more, when the other's load has ended
    request.num_computed_tokens = 2 * CHUNK
    workers.compute(request, blocks, 2 * CHUNK)
    workers.scheduler.request_finished(request)
    workers.step({})
    assert len(workers.written) == 1, "only what was vLLM's own"
    assert workers.serve(0) == CHUNK
    assert workers.serve(0) == (CHUNKS - 1) * CHUNK


def test_what_several_steps_compute_is_stored() -> None:
    workers = Workers()
    request = workers.request(0)
    assert workers.ask(request) == 0
    blocks = workers.allocate(request, 0)
    for _ in range(CHUNKS * CHUNK // BLOCK):
        workers.compute(request, blocks, BLOCK)
    workers.step({})
    assert len(workers.written) == CHUNKS


def test_an_offer_that_vllm_does_not_take_is_no_hit() -> None:
    workers = Workers()
    workers.serve(0)
    before = workers.scheduler.stats()
    request = workers.request(0)
    assert workers.ask(request) == (CHUNKS - 1) * CHUNK
    workers.allocate(request, 0)
    after = workers.scheduler.stats()
    for name in ("hit_tokens", "requested_tokens", "loaded_tokens"):
        assert counted(after, name) == counted(before, name)
    assert after["index_leases"] == 0


def counted(stats: dict[str, float], name: str) -> float:
    """Returns a counter, all labels together."""
    return sum(value for key, value in stats.items() if key.startswith(f"lmcache_{name}_total"))


# ---------------------------------------------------------------- kv_role


def test_a_producer_looks_nothing_up_and_a_consumer_stores_nothing() -> None:
    producer = Workers(loads=False)
    assert [producer.serve(0), producer.serve(0)] == [0, 0]
    assert len(producer.written) == CHUNKS
    assert counted(producer.scheduler.stats(), "requested_tokens") == 0
    consumer = Workers(stores=False)
    assert [consumer.serve(0), consumer.serve(0)] == [0, 0]
    assert consumer.written == []
    consumer.disk.update(producer.disk)
    assert consumer.serve(0) == (CHUNKS - 1) * CHUNK
    assert consumer.written == []


# ---------------------------------------------------------------- room in DRAM

HIT = (CHUNKS - 1) * CHUNK
"""Tokens of a whole hit: vLLM computes the last token itself, and with it the last chunk."""


def on_disk(prompts: int, slots: int, **named: Any) -> Workers:
    """Returns workers with room for `slots` chunks in DRAM, and prompts on disk."""
    first, workers = Workers(), Workers(slots=slots, **named)
    for number in range(prompts):
        first.serve(number)
    assert len(first.disk) == prompts * CHUNKS
    workers.disk = first.disk
    return workers


def missed(workers: Workers, before: dict[str, float]) -> dict[str, float]:
    """Returns missed tokens by reason."""
    name = 'lmcache_miss_tokens_total{reason="'
    after = workers.scheduler.stats()
    return {
        k[len(name) : -2]: v - before.get(k, 0) for k, v in after.items() if k.startswith(name) and v > before.get(k, 0)
    }


def test_queued_requests_that_found_no_room_are_prefetched_when_there_is_some() -> None:
    workers = on_disk(12, slots=2 * CHUNKS)
    before = workers.scheduler.stats()
    requests = [workers.request(number) for number in range(12)]
    for request in requests:
        workers.scheduler.on_new_request(request)
    for request in requests:
        assert workers.ask(request) == HIT
        blocks = workers.allocate(request, HIT)
        workers.compute(request, blocks, CHUNK)
        workers.kinds()
        workers.step({})
        workers.step({})
        workers.scheduler.request_finished(request)
    assert missed(workers, before) == {"tail": 12 * CHUNK}
    assert workers.scheduler.stats()["index_leases"] == 0


def test_the_next_request_is_prefetched_while_another_one_computes() -> None:
    workers = on_disk(2, slots=CHUNKS - 1)
    requests = [workers.request(number) for number in range(2)]
    for request in requests:
        workers.scheduler.on_new_request(request)
        workers.step({})
    assert workers.ask(requests[0]) == HIT
    blocks = workers.allocate(requests[0], HIT)
    workers.kinds()
    for _ in range(3):
        workers.step({})
    assert "prefetch" in workers.kinds(), "before vLLM has asked about it"
    workers.compute(requests[0], blocks, CHUNK)
    assert workers.ask(requests[1]) == HIT


def test_the_first_in_the_queue_takes_the_room_of_those_behind_it() -> None:
    workers = on_disk(2, slots=CHUNKS - 1)
    first, second = workers.request(0), workers.request(1)
    workers.scheduler.on_new_request(second)
    for _ in range(3):
        workers.step({})
    assert workers.ask(first) == HIT, "the other's lease holds all of DRAM"
    workers.allocate(first, HIT)
    assert workers.ask(second) == HIT


def test_a_request_waits_for_the_room_that_a_load_under_way_gives_back() -> None:
    workers = on_disk(2, slots=CHUNKS - 1)
    first, second = workers.request(0), workers.request(1)
    assert workers.ask(first) == HIT
    workers.hold = {"load"}
    workers.allocate(first, HIT)
    for _ in range(5):
        assert workers.scheduler.get_num_new_matched_tokens(second, 0) is None
        workers.step({})
    workers.hold = set()
    workers.report(0, workers.held)
    assert workers.ask(second) == HIT


def test_a_prefix_longer_than_dram_is_loaded_from_its_tier_only_if_a_failure_is_recomputed() -> None:
    for recomputes, tokens, reasons in (
        (True, HIT, {"tail": CHUNK}),
        (False, 2 * CHUNK, {"room": 2 * CHUNK}),
    ):
        small = on_disk(1, slots=2, recomputes=recomputes)
        before = small.scheduler.stats()
        request = small.request(0)
        assert small.ask(request) == tokens
        small.kinds()
        small.allocate(request, tokens)
        [load] = [job for job in small.jobs if job.kind == "load"]
        assert into_engine(load) == tokens // CHUNK
        assert missed(small, before) == reasons


@pytest.mark.parametrize("status", [Status.FAILED, Status.MISSING, Status.LATE])
def test_what_a_tier_does_not_give_is_not_waited_for_again(status: Status) -> None:
    workers = on_disk(1, slots=CHUNKS, recomputes=True)
    before = workers.scheduler.stats()
    workers.status = status
    assert workers.ask(workers.request(0), steps=6) == 0
    workers.allocate(workers.request(0), 0)
    [reason] = missed(workers, before)
    assert reason == ("evicted" if status is Status.MISSING else "failed")


def test_a_call_that_hangs_in_dram_costs_room_and_nobody_waits_for_ever() -> None:
    workers = on_disk(1, slots=CHUNKS, settings={"load_timeout_s": 0.05})
    workers.hold = {"write_back"}
    workers.serve(7)
    assert workers.held
    before = workers.scheduler.stats()
    request = workers.request(0)
    found = workers.ask(request, steps=1 << 20)
    workers.allocate(request, found)
    assert found < HIT
    assert "room" in missed(workers, before)


# ---------------------------------------------------------------- reset


def test_after_a_reset_nothing_is_stored_under_an_old_name() -> None:
    workers = Workers()
    request = workers.request(0)
    assert workers.ask(request) == 0
    blocks = workers.allocate(request, 0)
    workers.hold = {"write_back"}
    workers.compute(request, blocks, 2 * CHUNK)
    workers.step({})
    assert workers.kinds() == ["probe", "store"], "a store is planned in the step that computes"
    assert workers.held, "a write-back is under way"
    assert workers.scheduler.reset_cache()
    workers.hold = set()
    workers.report(0, workers.held)  # it was gathered before the reset, and finishes
    old = set(workers.disk)
    assert len(old) == 2
    workers.compute(request, blocks, 2 * CHUNK)  # its first half has the old weights
    workers.step({})
    assert "delete" not in workers.kinds()
    assert workers.disk == old
    assert [workers.serve(1), workers.serve(0), workers.serve(0)] == [0, 0, (CHUNKS - 1) * CHUNK]
    assert workers.disk > old


# ---------------------------------------------------------------- write-backs that failed


def test_a_write_back_that_failed_is_tried_again_when_the_tier_has_recovered() -> None:
    workers = Workers(slots=4 * CHUNKS)
    workers.status = Status.FAILED
    workers.serve(0)
    workers.serve(1)
    assert not workers.disk
    for _ in range(30):
        workers.step({})
    failed = [job for job in workers.jobs if job.kind == "write_back"]
    assert sum(len(job.ops) for job in failed) <= 2 * 2 * CHUNKS, "tried again and again"
    assert not workers.scheduler.has_pending_push_work, "an idle engine keeps stepping for a tier that fails"
    workers.status = Status.OK
    workers.serve(2)
    while workers.scheduler.has_pending_push_work:
        workers.step({})
    assert len(workers.disk) == 3 * CHUNKS


def test_a_write_back_that_failed_once_is_tried_again_before_the_engine_rests() -> None:
    workers = Workers(slots=4 * CHUNKS)
    request = workers.request(0)
    assert workers.ask(request) == 0
    blocks = workers.allocate(request, 0)
    workers.compute(request, blocks, request.num_tokens)
    workers.status = Status.FULL
    workers.step({})  # its write-back
    assert not workers.disk
    workers.status = Status.OK
    while workers.scheduler.has_pending_push_work:
        workers.step({})
    assert len(workers.disk) == CHUNKS


# ---------------------------------------------------------------- clears by other processes


def test_what_another_process_has_cleared_is_not_served_from_memory() -> None:
    workers = Workers()
    assert workers.serve(0) == 0
    assert workers.serve(0) == (CHUNKS - 1) * CHUNK
    workers.disk.clear()
    cleared: list[bytes | None] = [None]
    rank: Any = object.__new__(ConnectorWorker)
    rank._reported, rank._rank = None, SimpleNamespace(cleared_elsewhere=lambda: cleared)
    meta = rank.build_connector_worker_meta()
    workers.scheduler.update_connector_output(meta.aggregate(RankMeta([], cleared=[None])))
    assert workers.serve(0) == 0
    assert workers.serve(0) == (CHUNKS - 1) * CHUNK
    cleared.clear()
    assert rank.build_connector_worker_meta() is None


# ---------------------------------------------------------------- signals


def test_a_signal_is_handled_once_the_cache_has_changed_its_state() -> None:
    connector, done = object.__new__(LMCacheConnector), []

    def interrupted(side: object) -> None:
        signal.raise_signal(signal.SIGINT)
        done.append(side)

    request: Any = SimpleNamespace(request_id="r")
    connector._scheduler = Workers().scheduler
    with ctrl_c_raises(), pytest.raises(KeyboardInterrupt):
        connector._call_for(request, interrupted, None)
    with ctrl_c_raises(), pytest.raises(KeyboardInterrupt):
        connector._call(connector._scheduler, interrupted, None)
    assert len(done) == 2
