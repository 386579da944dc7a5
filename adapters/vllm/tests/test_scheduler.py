"""What the connector's scheduler decides, step by step, for workers that execute everything immediately. Without an engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from schedulerlab import BLOCK, CHUNK, CHUNKS, Workers

from lmcache_vllm.messages import Handshake

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
