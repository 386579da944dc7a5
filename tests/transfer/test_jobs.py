"""Reports are repeated until acknowledged; late ops cannot begin to write; a reset voids all older jobs and slots safely."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lmcache.format.codec import ObjectCodec
from lmcache.layout import ObjectLayout
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import ArenaSlot, Copy, Engine, Job, Name, Plan, Probe, Status, Tier
from lmcache.tiers.base import Read, Result
from lmcache.tiers.memory import MemoryTier
from lmcache.transfer import Transfer
from lmcache.transfer.arena import Arena
from lmcache.transfer.jobs import EngineView, JobTracker
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_spec

LAYOUT = ObjectLayout.canonical(tiny_spec(), 0, CHUNK)


def name(n: int) -> Name:
    return Name(b"n" * 32, n.to_bytes(32, "big"), 0, CHUNK, n)


def fill(n: int, slot: int, generation: int = 1) -> Copy:
    return Copy(name(n), Tier(0), ArenaSlot(slot, generation))


def plan(*jobs: Job, epoch: int = 0, acked: int = 0) -> Plan:
    return Plan(epoch, jobs, (acked,))


def test_a_report_is_repeated_until_a_plan_acknowledges_it() -> None:
    tracker = JobTracker(0)
    [active] = tracker.begin(plan(Job(1, "prefetch", (fill(1, 0),))), {})
    assert tracker.report().jobs == ()
    tracker.finish(active, [0], Status.OK, 10)
    first, second = tracker.report(), tracker.report()
    assert first.jobs == second.jobs
    assert [j.job for j in first.jobs] == [1]
    assert (first.jobs[0].final, first.jobs[0].nbytes) == (True, 10)
    tracker.begin(plan(acked=first.seq - 1), {})
    assert tracker.report().jobs, "it was reported after what this acknowledges"
    tracker.begin(plan(acked=second.seq), {})
    assert not tracker.report().jobs


def test_a_plan_that_is_delivered_twice_is_executed_once() -> None:
    tracker = JobTracker(0)
    job = Job(1, "prefetch", (fill(1, 0),))
    [active] = tracker.begin(plan(job), {})
    assert tracker.begin(plan(job), {}) == []
    tracker.finish(active, [0], Status.OK)
    assert tracker.begin(plan(job), {}) == [], "nor after it has ended, while its report may still be lost"


def test_a_late_job_is_reported_twice_and_cannot_begin_to_write() -> None:
    tracker = JobTracker(0)
    [active] = tracker.begin(plan(Job(1, "load", (fill(1, 0), fill(2, 1)), deadline=0.01)), {})
    tracker.finish(active, [0], Status.OK)
    time.sleep(0.02)
    assert not tracker.begin_engine_write(active), "the deadline counts even if no report was made since"
    [late] = tracker.report().jobs
    assert (late.statuses, late.final) == ((Status.OK, Status.LATE), False)
    tracker.begin(plan(acked=tracker.report().seq), {})
    tracker.finish(active, [1], Status.OK)
    [end] = tracker.report().jobs
    assert (end.statuses, end.final) == ((Status.OK, Status.LATE), True)


def test_a_job_is_not_reported_late_while_it_writes_engine_memory() -> None:
    tracker = JobTracker(0)
    [active] = tracker.begin(plan(Job(1, "load", (fill(1, 0),), deadline=0.01)), {})
    assert tracker.begin_engine_write(active)
    time.sleep(0.02)
    assert tracker.report().jobs == ()
    tracker.finish(active, [0], Status.OK)
    tracker.end_engine_write(active)
    assert tracker.report().jobs[0].statuses == (Status.OK,)


def test_a_fence_waits_for_the_current_copy_and_forbids_the_next() -> None:
    tracker = JobTracker(0)
    [active] = tracker.begin(plan(Job(1, "load", (fill(1, 0), fill(2, 1)))), {})
    assert tracker.begin_engine_write(active)
    assert not tracker.fence([1], 0.01)
    threading.Timer(0.05, lambda: tracker.end_engine_write(active)).start()
    assert tracker.fence([1], 30)
    assert not tracker.begin_engine_write(active)
    assert tracker.fence([99], 0), "unknown jobs write nothing"


def test_tags_are_exact_and_a_claim_removes_them() -> None:
    tracker = JobTracker(0)
    [active] = tracker.begin(plan(Job(1, "prefetch", (fill(1, 0, 7),))), {})
    tracker.tag(active, [0], LAYOUT)

    def held(n: int, slot: int, generation: int) -> bool:
        [reader] = tracker.begin(
            plan(Job(held.jobs, "load", (Copy(name(n), ArenaSlot(slot, generation), Engine()),))), {}
        )  # type: ignore[attr-defined]
        held.jobs += 1  # type: ignore[attr-defined]
        return [tag and tag.layout for tag in tracker.tags(reader, [0])] == [LAYOUT]

    held.jobs = 10  # type: ignore[attr-defined]
    assert held(1, 0, 7)
    assert not held(1, 0, 6), "another generation"
    assert not held(2, 0, 7), "another object"
    assert not held(1, 1, 7), "another slot"
    tracker.claim(0, 0)
    assert not held(1, 0, 7)


def test_after_a_reset_a_slot_waits_for_the_call_that_still_uses_it() -> None:
    tracker = JobTracker(0)
    [old] = tracker.begin(plan(Job(1, "prefetch", (fill(1, 0),))), {})
    [new] = tracker.begin(plan(Job(1, "prefetch", (fill(2, 0),)), epoch=1), {})
    assert tracker.report().epoch == 1
    assert not tracker.begin_engine_write(old)
    with pytest.raises(MemoryError, match="slot 0"):
        tracker.claim(0, 0)
    tracker.tag(old, [0], LAYOUT)
    tracker.finish(old, [0], Status.OK)
    assert tracker.report().jobs == (), "jobs of an earlier epoch are not reported"
    tracker.claim(0, 0)
    tracker.tag(new, [0], LAYOUT)
    tracker.finish(new, [0], Status.OK)
    assert [j.job for j in tracker.report().jobs] == [1]


class Hanging(MemoryTier):
    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def read_into(self, reads: list[Read], *, deadline: float | None = None) -> list[Result]:  # type: ignore[override]
        self.go.wait(30)
        return super().read_into(reads)


def open_transfer(tier: MemoryTier) -> tuple[Transfer, Arena]:
    spec = tiny_spec()
    arena = Arena(4, spec.object_bytes(0, CHUNK))
    io = ObjectCodec(spec, CHUNK)
    transfer = Transfer(
        spec,
        CHUNK,
        [arena],
        [tier],
        io=io,
        metrics=Metrics(),
        log=Throttle(),
        read_threads=2,
        write_threads=1,
        queue_bytes=1 << 30,
    )
    return transfer, arena


def wait_for(transfer: Transfer, job: int) -> tuple[int, ...]:
    for _ in range(1000):
        seen = transfer.tracker.news
        for report in transfer.tracker.report().jobs:
            if report.job == job and report.final:
                return report.statuses
        transfer.tracker.wait(seen, 0.05)
    raise AssertionError(f"job {job} never ended")


def test_a_hung_read_from_before_a_reset_cannot_damage_what_is_stored_after_it() -> None:
    tier = Hanging()
    transfer, _ = open_transfer(tier)
    pool, target = Pool("packed", 8, seed=1), Pool("packed", 8, seed=2)
    slots = scattered(CHUNK, pool)
    view = EngineView(pool.kv.bind(tiny_spec()), {0: slots})
    transfer.execute(plan(Job(1, "prefetch", (fill(1, 0),))))
    store = Job(2, "store", (Copy(name(2), Engine(), ArenaSlot(0, 2)),))
    transfer.execute(plan(store, epoch=1), {2: view})
    assert wait_for(transfer, 2) == (Status.FULL,), "the hung call may still write this slot"
    tier.go.set()
    for epoch in range(2, 1000):
        again = Job(3, "store", (Copy(name(3), Engine(), ArenaSlot(0, 3)),))
        transfer.execute(plan(again, epoch=epoch), {3: view})
        if wait_for(transfer, 3) == (Status.OK,):
            break
        time.sleep(0.005)
    back = EngineView(target.kv.bind(tiny_spec()), {0: slots})
    load = Job(4, "load", (Copy(name(3), ArenaSlot(0, 3), Engine()),))
    transfer.execute(plan(load, epoch=epoch), {4: back})
    assert wait_for(transfer, 4) == (Status.OK,)
    assert target.sequence(slots) == pool.sequence(slots)
    assert transfer.close()


def test_impossible_ops_fail_one_by_one() -> None:
    tier = MemoryTier()
    transfer, _ = open_transfer(tier)
    pool = Pool("packed", 8)
    view = EngineView(pool.kv.bind(tiny_spec()), {0: scattered(CHUNK, pool)})
    jobs = (
        Job(1, "store", (Copy(name(1), Engine(), ArenaSlot(0, 1)),)),  # no view was passed
        Job(2, "load", (Copy(name(2), ArenaSlot(1, 1), Engine()),)),  # the slot is empty
        Job(3, "write_back", (Copy(name(3), ArenaSlot(1, 1), Tier(0)),)),
        Job(4, "load", (Copy(name(4), Engine(), Engine()),)),  # no such hop
        Job(5, "store", (Copy(name(5), Engine(), ArenaSlot(99, 1)),)),  # no such slot
        Job(6, "probe", (Probe(name(6), 0),)),
        Job(
            7, "load", (Copy(name(7), Tier(0), ArenaSlot(2, 1)), Copy(name(7), ArenaSlot(2, 1), Engine()))
        ),  # not there
    )
    transfer.execute(plan(*jobs), {job.id: view for job in jobs if job.id != 1})
    expected = {
        1: (Status.FAILED,),
        2: (Status.SKIPPED,),
        3: (Status.SKIPPED,),
        4: (Status.FAILED,),
        5: (Status.FAILED,),
        6: (Status.MISSING,),
        7: (Status.MISSING, Status.SKIPPED),
    }
    assert {job: wait_for(transfer, job) for job in expected} == expected
    assert transfer.close()
    transfer.execute(plan(Job(8, "probe", (Probe(name(8), 0),))))
    assert wait_for(transfer, 8) == (Status.CANCELLED,)


def test_the_write_behind_queue_is_bounded_in_bytes() -> None:
    spec = tiny_spec()
    size = spec.object_bytes(0, CHUNK)
    go = threading.Event()

    class Slow(MemoryTier):
        def write(self, writes, *, deadline=None):  # type: ignore[no-untyped-def]
            go.wait(30)
            return super().write(writes)

    arena = Arena(4, size)
    transfer = Transfer(
        spec,
        CHUNK,
        [arena],
        [Slow()],
        io=ObjectCodec(spec, CHUNK),
        metrics=Metrics(),
        log=Throttle(),
        read_threads=2,
        write_threads=1,
        queue_bytes=2 * size,
    )
    pool = Pool("packed", 40)
    view = EngineView(pool.kv.bind(spec), {0: scattered(4 * CHUNK, pool)})
    ops = tuple(Copy(name(i), Engine(), ArenaSlot(i, 1), i * CHUNK) for i in range(4))
    transfer.execute(plan(Job(1, "store", ops)), {1: view})
    transfer.execute(plan(Job(2, "write_back", tuple(Copy(name(i), ArenaSlot(i, 1), Tier(0)) for i in range(4)))))
    assert transfer.tier_copier.queue()[1] == 2 * size
    go.set()
    assert sorted(wait_for(transfer, 2)) == [Status.OK, Status.OK, Status.SKIPPED, Status.SKIPPED]
    assert transfer.tier_copier.queue()[1] == 0
    assert transfer.close()


def test_slots_of_a_partial_job_need_not_be_consecutive() -> None:
    transfer, arena = open_transfer(MemoryTier())
    pool = Pool("nhd", 40, seed=3)
    slots = scattered(4 * CHUNK, pool)
    view = EngineView(pool.kv.bind(tiny_spec()), {0: slots})
    ops = (Copy(name(0), Engine(), ArenaSlot(0, 1), 0), Copy(name(3), Engine(), ArenaSlot(1, 1), 3 * CHUNK))
    transfer.execute(plan(Job(1, "store", ops)), {1: view})
    assert wait_for(transfer, 1) == (Status.OK, Status.OK)
    k = pool.tensors["k"]  # type: ignore[index]
    expected = torch.stack([layer[slots[3 * CHUNK :]] for layer in k]).view(torch.uint8).flatten()
    assert torch.equal(arena.view(1)[: expected.numel()], expected)
    assert transfer.close()
