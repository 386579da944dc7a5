"""The index: loads and prefetches, complete, partial, late and failed."""

from __future__ import annotations

import pytest

from lmcache.control import Index
from lmcache.plan import Chain, Copy, JobReport, Report, Status
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.index_cluster import ABCD, DISK, FAILED, LATE, MISSING, OK, SKIPPED, open_cluster, places
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

# -------------------------------------------------------------------- load


def test_a_load_copies_from_slots_until_a_deadline_and_ends_the_lease() -> None:
    cluster = open_cluster(load_deadline=7.0)
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    assert places(job) == [("ArenaSlot", "Engine", i * CHUNK) for i in range(4)]
    assert job.deadline == 7.0
    assert cluster.index.stats()["leases"] == 0
    cluster.complete(job, OK)
    assert cluster.lookup() == ("hit", 16, "end")


@pytest.mark.parametrize(
    ("skip", "tokens", "starts", "ok_tokens"),
    [(0, 11, [0, 4], 8), (4, None, [4, 8, 12], 16), (6, None, [4, 8, 12], 16), (6, 8, [4], 8)],
)
def test_an_engine_may_skip_what_it_has_and_load_less_than_the_hit(
    skip: int, tokens: int | None, starts: list[int], ok_tokens: int
) -> None:
    cluster = open_cluster()
    cluster.have()
    cluster.lookup()
    job = cluster.load_job(skip=skip, tokens=tokens)
    assert [start for _, _, start in places(job)] == starts
    assert cluster.complete(job, OK)[0].ok_tokens == ok_tokens


@pytest.mark.parametrize(("skip", "tokens"), [(16, None), (8, 8), (0, 3), (0, 0)])
def test_there_is_no_job_if_nothing_is_left_to_load(skip: int, tokens: int | None) -> None:
    cluster = open_cluster()
    cluster.have()
    cluster.lookup()
    assert cluster.load(skip=skip, tokens=tokens) is None
    assert cluster.index.stats()["leases"] == 0


def test_a_sliding_group_loads_only_its_window() -> None:
    cluster = open_cluster(groups=[("full", ALL), ("sliding", trailing(5))])
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    assert [(op.name.group, op.start // CHUNK) for op in job.ops if isinstance(op, Copy)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 2),
        (0, 3),
        (1, 3),
    ]


def test_a_load_from_a_tier_goes_through_a_slot_and_leaves_a_dram_hit() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    job = cluster.load_job()
    assert places(job) == [("Tier", "ArenaSlot", 0), ("ArenaSlot", "Engine", 0)]
    cluster.complete(job, OK)
    assert cluster.index.where(name_at(ABCD, 0, 0)) == ("dram", "disk")
    assert cluster.jobs() == []  # the disk holds it: no write-back


def test_without_a_free_slot_a_load_goes_directly_to_the_engine() -> None:
    cluster = open_cluster(slots=0, tiers=[DISK])
    cluster.hold()
    cluster.lookup()
    assert places(cluster.load_job()) == [("Tier", "Engine", i * CHUNK) for i in range(4)]


def test_a_load_does_not_evict_what_it_is_about_to_read() -> None:
    cluster = open_cluster(slots=2, tiers=[DISK])
    cluster.have(chain("one", "ab"))
    cluster.hold(at=(2, 3))
    cluster.lookup()
    kinds = [src for src, _, _ in places(cluster.load_job())]
    assert kinds == ["ArenaSlot", "ArenaSlot", "Tier", "Tier"]


def test_an_object_that_another_job_is_loading_is_read_from_its_tier() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"), owner="first")
    cluster.load_job("first")
    cluster.lookup(chain("one", "a"), owner="second")
    assert places(cluster.load_job("second")) == [("Tier", "Engine", 0)]


def test_a_partial_load_without_its_window_or_state_gives_only_what_the_engine_had() -> None:
    cluster = open_cluster(groups=[("full", ALL), ("mamba", HitRule("state_at"))])
    cluster.have()
    cluster.lookup()
    job = cluster.load_job(skip=5)
    [ended] = cluster.complete(job, OK, OK, OK, FAILED)
    assert ended.ok_tokens == 5


def test_a_load_that_fails_after_its_request_was_forgotten_is_not_remembered() -> None:
    cluster = open_cluster()
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    cluster.index.forget("reader")
    cluster.complete(job, FAILED)
    assert cluster.index.stats()["failed_owners"] == 0


def test_an_object_that_one_ranks_slot_has_lost_is_dropped_from_dram() -> None:
    cluster = open_cluster(ranks=2)
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    cluster.complete(job, OK, SKIPPED, OK, OK, rank=1)
    assert cluster.lookup(owner="other") == ("hit", 4, "failed")


def test_a_late_load_ends_at_its_deadline_and_again_when_it_is_final() -> None:
    cluster = open_cluster(slots=4)
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    [first] = cluster.complete(job, OK, OK, OK, LATE, final=False)
    assert (first.ok_tokens, first.final) == (12, False)
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    [second] = cluster.complete(job, OK, OK, OK, LATE, final=True)
    assert (second.ok_tokens, second.final) == (12, True)
    cluster.store_job(chain("one", "q"))


def test_a_load_that_no_rank_reports_is_late_after_its_deadline_and_keeps_its_slots() -> None:
    cluster = open_cluster(slots=1, tiers=[DISK], load_deadline=5.0)
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    job = cluster.load_job()
    assert cluster.index.tick(5.9) == []
    [ended] = cluster.index.tick(6.0)
    assert (ended.job, ended.ok_tokens, ended.final) == (job.id, 0, False)
    assert cluster.lookup(chain("one", "a")) == ("miss", 0, "failed_before")
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    [final] = cluster.complete(job, OK)
    assert (final.ok_tokens, final.final) == (0, True)
    assert cluster.index.where(name_at(ABCD, 0, 0)) == ("disk",)
    cluster.store_job(chain("one", "q"))


# -------------------------------------------------------------------- prefetch


def test_a_prefetch_loads_a_hit_into_dram_and_keeps_it_leased() -> None:
    cluster = open_cluster(slots=4, tiers=[DISK])
    cluster.hold()
    cluster.lookup()
    assert cluster.index.begin_prefetch("reader", 0.0) is not None
    [job] = cluster.jobs()
    assert places(job) == [("Tier", "ArenaSlot", 0)] * 4
    [ended] = cluster.complete(job, OK)
    assert (ended.kind, ended.ok_tokens) == ("prefetch", 16)
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    assert [src for src, _, _ in places(cluster.load_job())] == ["ArenaSlot"] * 4


def test_after_a_failed_prefetch_its_request_is_still_offered_hits() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold()
    cluster.lookup()
    cluster.index.begin_prefetch("reader", 0.0)
    [job] = cluster.jobs()
    cluster.complete(job, OK, MISSING, OK, OK)
    assert cluster.lookup() == ("hit", 4, "evicted")


def test_there_is_nothing_to_prefetch_without_a_lease_or_from_dram() -> None:
    cluster = open_cluster()
    assert cluster.index.begin_prefetch("reader", 0.0) is None
    cluster.have()
    cluster.lookup()
    assert cluster.index.begin_prefetch("reader", 0.0) is None
    cluster.index.check()


def test_a_load_of_names_that_repeat_reads_each_slot_and_leaves_no_reference() -> None:
    index = Index([("kv", ALL)], CHUNK, [8])
    names = [bytes([i]) * 32 for i in range(3)]
    job = index.begin_store(1, Chain(b"n" * 32, names, linked=False), first=0, last=3, now=0.0).job
    plan = index.take_plan()
    assert job is not None
    report = Report(plan.epoch, 0, 1, tuple(JobReport(j.id, (int(Status.OK),) * len(j.ops), True) for j in plan.jobs))
    index.report(report, 0.0)
    again = Chain(b"n" * 32, [names[0], names[1], names[0]], linked=False)
    assert index.lookup(2, again, 3 * CHUNK, 0.0).tokens == 3 * CHUNK
    load = index.begin_load(2, 0.0)
    [loading] = index.take_plan().jobs
    assert load == loading.id
    assert [op.src.index for op in loading.ops] == [0, 1, 0]  # type: ignore[union-attr]
    index.report(Report(plan.epoch, 0, 2, (JobReport(loading.id, (int(Status.OK),) * 3, True),)), 0.0)
    index.forget(2)
    index.check()
