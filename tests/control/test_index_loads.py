"""What the index promises of loads and prefetches, whole, partial, late and failed."""

from __future__ import annotations

import pytest
from indexdriver import ABCD, DISK, FAILED, LATE, MISSING, OK, SKIPPED, Lab, places

from lmcache.plan import Copy
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

# -------------------------------------------------------------------- load


def test_a_load_copies_from_slots_and_tells_how_many_tokens_arrived() -> None:
    lab = Lab(load_deadline=7.0)
    lab.have()
    lab.look()
    job = lab.load()
    assert places(job) == [("ArenaSlot", "Engine", i * CHUNK) for i in range(4)]
    assert job.deadline == 7.0
    assert lab.index.stats()["leases"] == 0
    [ended] = lab.answer(job, OK)
    assert (ended.kind, ended.owner, ended.ok_tokens, ended.final) == ("load", "me", 16, True)
    assert lab.look() == ("hit", 16, "end")


@pytest.mark.parametrize(
    ("skip", "tokens", "starts", "ok_tokens"),
    [(0, 11, [0, 4], 8), (4, None, [4, 8, 12], 16), (6, None, [4, 8, 12], 16), (6, 8, [4], 8)],
)
def test_an_engine_may_skip_what_it_has_and_take_less_than_the_hit(
    skip: int, tokens: int | None, starts: list[int], ok_tokens: int
) -> None:
    lab = Lab()
    lab.have()
    lab.look()
    job = lab.load(skip=skip, tokens=tokens)
    assert [start for _, _, start in places(job)] == starts
    assert lab.answer(job, OK)[0].ok_tokens == ok_tokens


@pytest.mark.parametrize(("skip", "tokens"), [(16, None), (8, 8), (0, 3), (0, 0)])
def test_there_is_no_job_if_nothing_is_left_to_load(skip: int, tokens: int | None) -> None:
    lab = Lab()
    lab.have()
    lab.look()
    assert lab.index.begin_load("me", 0.0, skip=skip, tokens=tokens) is None
    assert lab.index.stats()["leases"] == 0


def test_a_sliding_group_loads_only_its_window() -> None:
    lab = Lab(groups=[("full", ALL), ("sliding", trailing(5))])
    lab.have()
    lab.look()
    job = lab.load()
    assert [(op.name.group, op.start // CHUNK) for op in job.ops if isinstance(op, Copy)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 2),
        (0, 3),
        (1, 3),
    ]


def test_what_lies_in_a_tier_passes_through_a_slot_and_is_a_dram_hit_afterwards() -> None:
    lab = Lab(tiers=[DISK])
    lab.on_tier(chain("one", "a"))
    lab.look(chain("one", "a"))
    job = lab.load()
    assert places(job) == [("Tier", "ArenaSlot", 0), ("ArenaSlot", "Engine", 0)]
    lab.answer(job, OK)
    assert lab.index.where(name_at(ABCD, 0, 0)) == ("dram", "disk")
    assert lab.jobs() == []  # the disk is known to hold it: no spill


def test_without_a_free_slot_a_load_goes_straight_into_the_engine() -> None:
    lab = Lab(slots=0, tiers=[DISK])
    lab.on_tier()
    lab.look()
    assert places(lab.load()) == [("Tier", "Engine", i * CHUNK) for i in range(4)]


def test_a_load_does_not_evict_what_it_is_about_to_read() -> None:
    lab = Lab(slots=2, tiers=[DISK])
    lab.have(chain("one", "ab"))
    lab.index.announce(0, 0, [name_at(ABCD, 0, i) for i in (2, 3)], True, 0.0)
    lab.look()
    kinds = [src for src, _, _ in places(lab.load())]
    assert kinds == ["ArenaSlot", "ArenaSlot", "Tier", "Tier"]


def test_an_object_that_another_job_is_filling_is_read_from_its_tier() -> None:
    lab = Lab(tiers=[DISK])
    lab.on_tier(chain("one", "a"))
    lab.look(chain("one", "a"), owner="first")
    lab.load("first")
    lab.look(chain("one", "a"), owner="second")
    assert places(lab.load("second")) == [("Tier", "Engine", 0)]


def test_a_partial_load_counts_only_up_to_the_first_missing_chunk_on_any_rank() -> None:
    lab = Lab(ranks=2)
    lab.have()
    lab.look()
    job = lab.load()
    assert lab.answer(job, OK, OK, OK, FAILED, rank=0) == []
    [ended] = lab.answer(job, OK, OK, FAILED, OK, rank=1)
    assert ended.ok_tokens == 8
    assert ended.statuses == (OK, OK, FAILED, FAILED)


def test_a_partial_load_without_its_window_or_state_is_worth_only_what_the_engine_had() -> None:
    lab = Lab(groups=[("full", ALL), ("mamba", HitRule("state_at"))])
    lab.have()
    lab.look()
    job = lab.load(skip=5)
    [ended] = lab.answer(job, OK, OK, OK, FAILED)
    assert ended.ok_tokens == 5


def test_after_a_failed_load_the_owner_is_not_offered_anything_until_it_is_forgotten() -> None:
    lab = Lab()
    lab.have()
    lab.look()
    job = lab.load()
    lab.look()  # it asks again while the load is under way
    lab.answer(job, OK, OK, OK, FAILED)
    assert lab.index.stats()["leases"] == 0
    assert lab.look() == ("miss", 0, "failed_before")
    assert lab.index.begin_load("me", 0.0) is None
    assert lab.look(owner="other")[0] == "hit"
    lab.index.release("me")
    assert lab.look()[0] == "miss"
    lab.index.forget("me")
    assert lab.look()[0] == "hit"


def test_a_load_that_fails_after_its_owner_was_forgotten_leaves_no_trace() -> None:
    lab = Lab()
    lab.have()
    lab.look()
    job = lab.load()
    lab.index.forget("me")
    lab.answer(job, FAILED)
    assert lab.index.stats()["failed_owners"] == 0


def test_a_rank_whose_slot_lost_the_object_makes_it_leave_dram() -> None:
    lab = Lab(ranks=2)
    lab.have()
    lab.look()
    job = lab.load()
    lab.answer(job, OK, SKIPPED, OK, OK, rank=1)
    assert lab.look(owner="other") == ("hit", 4, "failed")


def test_late_loads_end_twice_at_their_deadline_and_when_nothing_moves_any_more() -> None:
    lab = Lab(slots=4)
    lab.have()
    lab.look()
    job = lab.load()
    [first] = lab.answer(job, OK, OK, OK, LATE, final=False)
    assert (first.ok_tokens, first.final) == (12, False)
    assert lab.index.begin_store("x", chain("one", "q"), first=0, last=1, now=0.0).skipped == {"full": 1}
    [second] = lab.answer(job, OK, OK, OK, LATE, final=True)
    assert (second.ok_tokens, second.final) == (12, True)
    lab.store(chain("one", "q"))


def test_a_load_no_rank_reports_on_is_late_by_the_clock_and_its_slots_stay_held() -> None:
    lab = Lab(slots=1, tiers=[DISK], load_deadline=5.0)
    lab.on_tier(chain("one", "a"))
    lab.look(chain("one", "a"))
    job = lab.load()
    assert lab.index.tick(5.9) == []
    [ended] = lab.index.tick(6.0)
    assert (ended.job, ended.ok_tokens, ended.final) == (job.id, 0, False)
    assert lab.look(chain("one", "a")) == ("miss", 0, "failed_before")
    assert lab.index.begin_store("x", chain("one", "q"), first=0, last=1, now=6.0).skipped == {"full": 1}
    [final] = lab.answer(job, OK)
    assert (final.ok_tokens, final.final) == (0, True)
    assert lab.index.where(name_at(ABCD, 0, 0)) == ("disk",)
    lab.store(chain("one", "q"))


# -------------------------------------------------------------------- prefetch


def test_a_prefetch_brings_a_hit_into_dram_and_keeps_it_there_for_its_owner() -> None:
    lab = Lab(slots=4, tiers=[DISK])
    lab.on_tier()
    lab.look()
    assert lab.index.begin_prefetch("me", 0.0) is not None
    [job] = lab.jobs()
    assert places(job) == [("Tier", "ArenaSlot", 0)] * 4
    [ended] = lab.answer(job, OK)
    assert (ended.kind, ended.ok_tokens) == ("prefetch", 16)
    assert lab.index.begin_store("x", chain("one", "q"), first=0, last=1, now=0.0).skipped == {"full": 1}
    assert [src for src, _, _ in places(lab.load())] == ["ArenaSlot"] * 4


def test_a_failed_prefetch_is_not_held_against_its_owner() -> None:
    lab = Lab(tiers=[DISK])
    lab.on_tier()
    lab.look()
    lab.index.begin_prefetch("me", 0.0)
    [job] = lab.jobs()
    lab.answer(job, OK, MISSING, OK, OK)
    assert lab.look() == ("hit", 4, "evicted")


def test_there_is_nothing_to_prefetch_without_a_lease_or_from_dram_alone() -> None:
    lab = Lab()
    assert lab.index.begin_prefetch("me", 0.0) is None
    lab.have()
    lab.look()
    assert lab.index.begin_prefetch("me", 0.0) is None
    lab.index.check()
