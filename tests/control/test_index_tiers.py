"""The index and the tiers below DRAM: write-backs, directories, probes."""

from __future__ import annotations

import pytest

from lmcache.control import TierInfo
from lmcache.plan import Copy, Delete, Name, Probe, Status, Tier
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.index_cluster import (
    ABCD,
    CORRUPT,
    DISK,
    FAILED,
    LATE,
    MISSING,
    OK,
    REDIS,
    SKIPPED,
    open_cluster,
)
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

# -------------------------------------------------------------------- tiers


def test_a_ready_object_is_written_back_to_every_tier_that_does_not_hold_it() -> None:
    cluster = open_cluster(tiers=[DISK, REDIS])
    cluster.hold(at=[0])
    cluster.complete(cluster.store_job(), OK)
    write_backs = cluster.jobs("write_back")
    assert [[(op.name.depth, op.dst) for op in job.ops if isinstance(op, Copy)] for job in write_backs] == [
        [(i, Tier(0)) for i in (1, 2, 3)],
        [(i, Tier(1)) for i in (0, 1, 2, 3)],
    ]
    cluster.complete(write_backs[0], OK, FAILED, OK)
    assert [cluster.index.where(name_at(ABCD, 0, i)) for i in range(4)] == [
        ("dram", "disk"),
        ("dram", "disk"),
        ("dram",),
        ("dram", "disk"),
    ]


def test_a_slot_is_held_while_it_is_written_back() -> None:
    cluster = open_cluster(slots=1, tiers=[DISK])
    cluster.complete(cluster.store_job(chain("one", "a")), OK)
    [write_back] = cluster.jobs("write_back")
    assert cluster.store(chain("one", "b"), "x").skipped == {"full": 1}
    cluster.complete(write_back, SKIPPED)
    cluster.store_job(chain("one", "b"))
    assert cluster.lookup(chain("one", "a")) == ("miss", 0, "evicted")


def test_admission_decides_what_is_written_back() -> None:
    cluster = open_cluster(tiers=[DISK, TierInfo("far")], admit=lambda tier, name: tier == 1 and name.depth < 2)
    cluster.complete(cluster.store_job(), OK)
    [write_back] = cluster.jobs("write_back")
    assert [(op.name.depth, op.dst) for op in write_back.ops if isinstance(op, Copy)] == [(0, Tier(1)), (1, Tier(1))]


def test_what_is_loaded_from_a_far_tier_is_written_to_the_nearer_ones() -> None:
    cluster = open_cluster(tiers=[DISK, TierInfo("far"), TierInfo("farther")])
    cluster.hold(chain("one", "a"), tier=1)
    cluster.lookup(chain("one", "a"))
    cluster.complete(cluster.load_job(), OK)
    [write_back] = cluster.jobs("write_back")
    assert [op.dst for op in write_back.ops if isinstance(op, Copy)] == [Tier(0)]


@pytest.mark.parametrize("rule", [ALL, trailing(4)])
def test_an_object_in_a_tier_is_offered_only_if_every_rank_has_its_part(rule: HitRule) -> None:
    cluster = open_cluster(ranks=2, tiers=[DISK], groups=[("some", rule)])
    name = name_at(ABCD, 0, 0)
    cluster.index.announce(0, 0, [name], True, 0.0)
    assert cluster.lookup()[0] == "miss"
    cluster.index.announce(0, 1, [name], True, 0.0)
    assert cluster.lookup(chain("one", "a")) == ("hit", 4, "end")
    cluster.index.announce(0, 0, [name], False, 0.0)
    assert cluster.lookup(chain("one", "a")) == ("miss", 0, "evicted" if rule is ALL else "group")


def test_announcements_of_another_chunk_size_or_group_are_ignored() -> None:
    cluster = open_cluster(tiers=[DISK])
    space, digest = ABCD.namespace, ABCD.digests[0]
    cluster.index.announce(0, 0, [Name(space, digest, 0, CHUNK + 1, 0), Name(space, digest, 7, CHUNK, 0)], True, 0.0)
    assert cluster.lookup()[0] == "miss"


@pytest.mark.parametrize(("status", "reason"), [(MISSING, "evicted"), (FAILED, "failed")])
def test_what_could_not_be_loaded_from_a_tier_is_not_offered_from_it_again(status: Status, reason: str) -> None:
    cluster = open_cluster(tiers=[DISK], ranks=2)
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    job = cluster.load_job()
    cluster.complete(job, status, SKIPPED, rank=1)
    assert cluster.lookup(chain("one", "a"), owner="other") == ("miss", 0, reason)
    assert cluster.jobs("delete") == []


def test_what_was_late_is_offered_from_its_tier_again() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    cluster.complete(cluster.load_job(), LATE)
    assert cluster.lookup(chain("one", "a"), owner="other")[0] == "hit"


def test_an_object_that_is_corrupt_on_two_ranks_is_deleted_once() -> None:
    cluster = open_cluster(tiers=[DISK], ranks=2, slots=0)
    cluster.hold(chain("one", "a"))
    cluster.lookup(chain("one", "a"))
    job = cluster.load_job()
    cluster.complete(job, CORRUPT, rank=0)
    cluster.complete(job, CORRUPT, rank=1)
    assert [job.ops for job in cluster.jobs("delete")] == [(Delete(name_at(ABCD, 0, 0), 0),)]


# -------------------------------------------------------------------- shared tiers


def test_a_shared_tier_is_probed_once_per_request_and_what_it_holds_is_a_hit() -> None:
    cluster = open_cluster(tiers=[DISK, REDIS], probe_deadline=0.5, ranks=2)
    cluster.hold(tier=1, announce=False)
    assert cluster.lookup() == ("pending", 0, "probing")
    [probe] = cluster.jobs("probe")
    assert probe.ops == tuple(Probe(name_at(ABCD, 0, i), 1) for i in range(4))
    assert probe.deadline == 0.5
    assert cluster.lookup() == ("pending", 0, "probing")
    assert cluster.jobs() == []
    cluster.complete(probe, OK, rank=0)
    assert cluster.lookup()[0] == "pending"
    cluster.complete(probe, OK, OK, MISSING, OK, rank=1)
    assert cluster.lookup() == ("hit", 8, "absent")
    assert cluster.jobs() == []


def test_a_late_probe_is_a_miss_and_a_hit_for_later_requests() -> None:
    cluster = open_cluster(tiers=[REDIS], probe_deadline=0.5)
    cluster.hold(announce=False)
    cluster.lookup()
    [probe] = cluster.jobs("probe")
    cluster.now = 0.5
    assert cluster.lookup() == ("miss", 0, "late")
    cluster.complete(probe, OK)
    assert cluster.lookup(owner="other") == ("hit", 16, "end")


def test_a_shared_tier_is_probed_only_for_what_is_missing() -> None:
    cluster = open_cluster(tiers=[REDIS])
    cluster.have(chain("one", "ab"))
    assert cluster.lookup(chain("one", "ab")) == ("hit", 8, "end")
    assert cluster.lookup(owner="other")[0] == "pending"
    assert [op.name.depth for job in cluster.jobs() for op in job.ops if isinstance(op, Probe)] == [2, 3]


def test_a_lookup_of_something_else_that_is_pending_ends_the_lease() -> None:
    cluster = open_cluster(tiers=[REDIS])
    cluster.have(chain("one", "ab"))
    cluster.lookup(chain("one", "ab"))
    assert cluster.lookup(chain("one", "xy"))[0] == "pending"
    assert cluster.load() is None


def test_probes_of_forgotten_requests_and_old_probes_are_dropped() -> None:
    cluster = open_cluster(tiers=[REDIS], lease_ttl=10.0)
    for owner in ("a", "b"):
        cluster.lookup(owner=owner)
    cluster.index.forget("a")
    assert list(cluster.index._probes) == ["b"]
    cluster.index.tick(11.0)
    assert not cluster.index._probes
