"""What the index believes of the tiers below DRAM, and what it asks of them."""

from __future__ import annotations

import pytest
from indexdriver import ABCD, CORRUPT, DISK, FAILED, LATE, MISSING, OK, REDIS, SKIPPED, Lab

from lmcache.control import TierInfo
from lmcache.plan import Copy, Delete, Name, Probe, Status, Tier
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

# -------------------------------------------------------------------- tiers


def test_a_ready_object_is_written_to_every_tier_that_is_not_known_to_hold_it() -> None:
    lab = Lab(tiers=[DISK, REDIS])
    lab.index.announce(0, 0, [name_at(ABCD, 0, 0)], True, 0.0)
    lab.answer(lab.store(), OK)
    spills = lab.jobs("write_back")
    assert [[(op.name.depth, op.dst) for op in job.ops if isinstance(op, Copy)] for job in spills] == [
        [(i, Tier(0)) for i in (1, 2, 3)],
        [(i, Tier(1)) for i in (0, 1, 2, 3)],
    ]
    lab.answer(spills[0], OK, FAILED, OK)
    assert [lab.index.where(name_at(ABCD, 0, i)) for i in range(4)] == [
        ("dram", "disk"),
        ("dram", "disk"),
        ("dram",),
        ("dram", "disk"),
    ]


def test_a_slot_is_held_while_it_is_written_to_a_tier() -> None:
    lab = Lab(slots=1, tiers=[DISK])
    lab.answer(lab.store(chain("one", "a")), OK)
    [spill] = lab.jobs("write_back")
    assert lab.index.begin_store("x", chain("one", "b"), first=0, last=1, now=0.0).skipped == {"full": 1}
    lab.answer(spill, SKIPPED)
    lab.store(chain("one", "b"))
    assert lab.look(chain("one", "a")) == ("miss", 0, "evicted")


def test_admission_decides_what_is_written_to_a_tier() -> None:
    lab = Lab(tiers=[DISK, TierInfo("far")], admit=lambda tier, name: tier == 1 and name.depth < 2)
    lab.answer(lab.store(), OK)
    [spill] = lab.jobs("write_back")
    assert [(op.name.depth, op.dst) for op in spill.ops if isinstance(op, Copy)] == [(0, Tier(1)), (1, Tier(1))]


def test_what_comes_from_a_far_tier_is_promoted_to_the_nearer_ones() -> None:
    lab = Lab(tiers=[DISK, TierInfo("far"), TierInfo("farther")])
    lab.on_tier(chain("one", "a"), tier=1)
    lab.look(chain("one", "a"))
    lab.answer(lab.load(), OK)
    [spill] = lab.jobs("write_back")
    assert [op.dst for op in spill.ops if isinstance(op, Copy)] == [Tier(0)]


@pytest.mark.parametrize("rule", [ALL, trailing(4)])
def test_an_object_in_a_tier_exists_only_if_every_rank_has_its_part(rule: HitRule) -> None:
    lab = Lab(ranks=2, tiers=[DISK], groups=[("some", rule)])
    name = name_at(ABCD, 0, 0)
    lab.index.announce(0, 0, [name], True, 0.0)
    assert lab.look()[0] == "miss"
    lab.index.announce(0, 1, [name], True, 0.0)
    assert lab.look(chain("one", "a")) == ("hit", 4, "end")
    lab.index.announce(0, 0, [name], False, 0.0)
    assert lab.look(chain("one", "a")) == ("miss", 0, "evicted" if rule is ALL else "group")


def test_objects_of_another_chunk_size_or_group_are_not_announced() -> None:
    lab = Lab(tiers=[DISK])
    space, digest = ABCD.namespace, ABCD.digests[0]
    lab.index.announce(0, 0, [Name(space, digest, 0, CHUNK + 1, 0), Name(space, digest, 7, CHUNK, 0)], True, 0.0)
    assert lab.look()[0] == "miss"


@pytest.mark.parametrize(("status", "reason"), [(MISSING, "evicted"), (CORRUPT, "corrupt"), (FAILED, "failed")])
def test_what_a_tier_failed_to_deliver_is_not_offered_from_it_again(status: Status, reason: str) -> None:
    lab = Lab(tiers=[DISK], ranks=2)
    lab.on_tier(chain("one", "a"))
    lab.look(chain("one", "a"))
    job = lab.load()
    lab.answer(job, status, SKIPPED, rank=1)
    assert lab.look(chain("one", "a"), owner="other") == ("miss", 0, reason)
    deletes = [op for job in lab.jobs("delete") for op in job.ops]
    assert deletes == ([Delete(name_at(ABCD, 0, 0), 0)] if status is CORRUPT else [])


def test_a_late_tier_is_asked_again() -> None:
    lab = Lab(tiers=[DISK])
    lab.on_tier(chain("one", "a"))
    lab.look(chain("one", "a"))
    lab.answer(lab.load(), LATE)
    assert lab.look(chain("one", "a"), owner="other")[0] == "hit"


def test_two_ranks_that_find_corruption_delete_it_once() -> None:
    lab = Lab(tiers=[DISK], ranks=2, slots=0)
    lab.on_tier(chain("one", "a"))
    lab.look(chain("one", "a"))
    job = lab.load()
    lab.answer(job, CORRUPT, rank=0)
    lab.answer(job, CORRUPT, rank=1)
    assert len(lab.jobs("delete")) == 1


# -------------------------------------------------------------------- shared tiers


def test_a_shared_tier_is_asked_once_per_owner_and_its_answer_is_a_hit() -> None:
    lab = Lab(tiers=[DISK, REDIS], probe_deadline=0.5, ranks=2)
    assert lab.look() == ("pending", 0, "probing")
    [probe] = lab.jobs("probe")
    assert probe.ops == tuple(Probe(name_at(ABCD, 0, i), 1) for i in range(4))
    assert probe.deadline == 0.5
    assert lab.look() == ("pending", 0, "probing")
    assert lab.jobs() == []
    lab.answer(probe, OK, rank=0)
    assert lab.look()[0] == "pending"
    lab.answer(probe, OK, OK, MISSING, OK, rank=1)
    assert lab.look() == ("hit", 8, "absent")
    assert lab.jobs() == []


def test_a_shared_tier_that_answers_late_is_a_miss_and_known_afterwards() -> None:
    lab = Lab(tiers=[REDIS], probe_deadline=0.5)
    lab.look()
    [probe] = lab.jobs("probe")
    lab.now = 0.5
    assert lab.look() == ("miss", 0, "late")
    lab.answer(probe, OK)
    assert lab.look(owner="other") == ("hit", 16, "end")


def test_a_shared_tier_is_asked_only_for_what_is_missing() -> None:
    lab = Lab(tiers=[REDIS])
    lab.have(chain("one", "ab"))
    assert lab.look(chain("one", "ab")) == ("hit", 8, "end")
    assert lab.look(owner="other")[0] == "pending"
    assert [op.name.depth for job in lab.jobs() for op in job.ops if isinstance(op, Probe)] == [2, 3]


def test_an_owner_that_asks_something_else_meanwhile_loses_its_lease() -> None:
    lab = Lab(tiers=[REDIS])
    lab.have(chain("one", "ab"))
    lab.look(chain("one", "ab"))
    assert lab.look(chain("one", "xy"))[0] == "pending"
    assert lab.index.begin_load("me", 0.0) is None


def test_forgotten_owners_and_old_questions_are_not_remembered() -> None:
    lab = Lab(tiers=[REDIS], lease_ttl=10.0)
    for owner in ("a", "b"):
        lab.look(owner=owner)
    lab.index.forget("a")
    assert list(lab.index._probes) == ["b"]
    lab.index.tick(11.0)
    assert not lab.index._probes
