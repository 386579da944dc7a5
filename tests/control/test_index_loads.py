"""What the index promises of loads and prefetches, whole, partial, late and failed."""

from __future__ import annotations

import pytest

from lmcache.plan import Copy
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
    cluster.answer(job, OK)
    assert cluster.lookup() == ("hit", 16, "end")


@pytest.mark.parametrize(
    ("skip", "tokens", "starts", "ok_tokens"),
    [(0, 11, [0, 4], 8), (4, None, [4, 8, 12], 16), (6, None, [4, 8, 12], 16), (6, 8, [4], 8)],
)
def test_an_engine_may_skip_what_it_has_and_take_less_than_the_hit(
    skip: int, tokens: int | None, starts: list[int], ok_tokens: int
) -> None:
    cluster = open_cluster()
    cluster.have()
    cluster.lookup()
    job = cluster.load_job(skip=skip, tokens=tokens)
    assert [start for _, _, start in places(job)] == starts
    assert cluster.answer(job, OK)[0].ok_tokens == ok_tokens


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


def test_what_lies_in_a_tier_passes_through_a_slot_and_is_a_dram_hit_afterwards() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    job = cluster.load_job()
    assert places(job) == [("Tier", "ArenaSlot", 0), ("ArenaSlot", "Engine", 0)]
    cluster.answer(job, OK)
    assert cluster.index.where(name_at(ABCD, 0, 0)) == ("dram", "disk")
    assert cluster.jobs() == []  # the disk is known to hold it: no spill


def test_without_a_free_slot_a_load_goes_straight_into_the_engine() -> None:
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


def test_an_object_that_another_job_is_filling_is_read_from_its_tier() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"), owner="first")
    cluster.load_job("first")
    cluster.lookup(chain("one", "a"), owner="second")
    assert places(cluster.load_job("second")) == [("Tier", "Engine", 0)]


def test_a_partial_load_without_its_window_or_state_is_worth_only_what_the_engine_had() -> None:
    cluster = open_cluster(groups=[("full", ALL), ("mamba", HitRule("state_at"))])
    cluster.have()
    cluster.lookup()
    job = cluster.load_job(skip=5)
    [ended] = cluster.answer(job, OK, OK, OK, FAILED)
    assert ended.ok_tokens == 5


def test_a_load_that_fails_after_its_owner_was_forgotten_leaves_no_trace() -> None:
    cluster = open_cluster()
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    cluster.index.forget("reader")
    cluster.answer(job, FAILED)
    assert cluster.index.stats()["failed_owners"] == 0


def test_a_rank_whose_slot_lost_the_object_makes_it_leave_dram() -> None:
    cluster = open_cluster(ranks=2)
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    cluster.answer(job, OK, SKIPPED, OK, OK, rank=1)
    assert cluster.lookup(owner="other") == ("hit", 4, "failed")


def test_late_loads_end_twice_at_their_deadline_and_when_nothing_moves_any_more() -> None:
    cluster = open_cluster(slots=4)
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    [first] = cluster.answer(job, OK, OK, OK, LATE, final=False)
    assert (first.ok_tokens, first.final) == (12, False)
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    [second] = cluster.answer(job, OK, OK, OK, LATE, final=True)
    assert (second.ok_tokens, second.final) == (12, True)
    cluster.store_job(chain("one", "q"))


def test_a_load_no_rank_reports_on_is_late_by_the_clock_and_its_slots_stay_held() -> None:
    cluster = open_cluster(slots=1, tiers=[DISK], load_deadline=5.0)
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    job = cluster.load_job()
    assert cluster.index.tick(5.9) == []
    [ended] = cluster.index.tick(6.0)
    assert (ended.job, ended.ok_tokens, ended.final) == (job.id, 0, False)
    assert cluster.lookup(chain("one", "a")) == ("miss", 0, "failed_before")
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    [final] = cluster.answer(job, OK)
    assert (final.ok_tokens, final.final) == (0, True)
    assert cluster.index.where(name_at(ABCD, 0, 0)) == ("disk",)
    cluster.store_job(chain("one", "q"))


# -------------------------------------------------------------------- prefetch


def test_a_prefetch_brings_a_hit_into_dram_and_keeps_it_there_for_its_owner() -> None:
    cluster = open_cluster(slots=4, tiers=[DISK])
    cluster.hold()
    cluster.lookup()
    assert cluster.index.begin_prefetch("reader", 0.0) is not None
    [job] = cluster.jobs()
    assert places(job) == [("Tier", "ArenaSlot", 0)] * 4
    [ended] = cluster.answer(job, OK)
    assert (ended.kind, ended.ok_tokens) == ("prefetch", 16)
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    assert [src for src, _, _ in places(cluster.load_job())] == ["ArenaSlot"] * 4


def test_a_failed_prefetch_is_not_held_against_its_owner() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold()
    cluster.lookup()
    cluster.index.begin_prefetch("reader", 0.0)
    [job] = cluster.jobs()
    cluster.answer(job, OK, MISSING, OK, OK)
    assert cluster.lookup() == ("hit", 4, "evicted")


def test_there_is_nothing_to_prefetch_without_a_lease_or_from_dram_alone() -> None:
    cluster = open_cluster()
    assert cluster.index.begin_prefetch("reader", 0.0) is None
    cluster.have()
    cluster.lookup()
    assert cluster.index.begin_prefetch("reader", 0.0) is None
    cluster.index.check()
