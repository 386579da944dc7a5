"""The index: stores, lookups, leases, eviction and settings. The contract itself is in the conformance suite, `suites.index`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.control import Index, TierInfo, planner
from lmcache.control.eviction import POLICIES, Lru, hears
from lmcache.control.extents import READY
from lmcache.errors import ConfigError
from lmcache.plan import ArenaSlot, Chain, Copy, JobReport, Report
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.index_cluster import ABCD, DISK, FAILED, LATE, OK, open_cluster
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

# -------------------------------------------------------------------- store


def test_a_report_with_too_few_statuses_counts_as_failed() -> None:
    cluster = open_cluster()
    job = cluster.store_job()
    cluster.index.report(Report(0, 0, 1, (JobReport(job.id, (1, 1), True),)), 0.0)
    assert cluster.lookup() == ("miss", 0, "failed")


def test_a_slot_is_not_reused_while_a_hung_store_may_still_write_it() -> None:
    cluster = open_cluster(slots=1)
    hung = cluster.store_job(chain("one", "a"))
    cluster.complete(hung, LATE, final=False)
    refused = cluster.store(chain("one", "b"), "x")
    assert (refused.job, refused.accepted, refused.skipped) == (None, 0, {"full": 1})
    cluster.complete(hung, LATE, final=True)
    again = cluster.store_job(chain("one", "b"))
    before, after = hung.ops[0], again.ops[0]
    assert isinstance(before, Copy)
    assert isinstance(after, Copy)
    assert isinstance(before.dst, ArenaSlot)
    assert isinstance(after.dst, ArenaSlot)
    assert after.dst.index == before.dst.index
    assert after.dst.generation > before.dst.generation


def test_only_what_is_absent_is_copied_and_the_rest_is_counted_by_reason() -> None:
    cluster = open_cluster(slots=5)
    cluster.have(chain("one", "ab"))
    resident = [[True, True, True, True, False, True]]
    stored = cluster.store(chain("one", "abcdef"), "x", resident=resident)
    assert stored.accepted == 2 * CHUNK
    assert stored.skipped == {"present": 2, "resident": 1, "parent": 1}


def test_a_store_that_does_not_fit_keeps_the_beginning_of_the_chain() -> None:
    cluster = open_cluster(slots=3)
    stored = cluster.store(chain("one", "abcdef"), "x")
    assert stored.accepted == 3 * CHUNK
    assert stored.skipped == {"full": 1, "parent": 2}
    cluster.settle()
    assert cluster.lookup(chain("one", "abcdef")) == ("hit", 3 * CHUNK, "absent")


def test_a_parent_is_never_evicted_to_make_room_for_its_child() -> None:
    cluster = open_cluster(slots=2)
    cluster.have(chain("one", "ab"))
    stored = cluster.store(chain("one", "abc"), "x", first=2, last=3)
    assert stored.skipped == {"full": 1}
    assert cluster.lookup(chain("one", "ab")) == ("hit", 8, "end")


def test_a_chunk_after_a_gap_is_not_stored_but_one_whose_parent_is_in_a_tier_is() -> None:
    cluster = open_cluster(tiers=[DISK])
    stored = cluster.store(ABCD, "x", first=2, last=4)
    assert stored.skipped == {"parent": 2}
    cluster.hold(chain("one", "ab"))
    job = cluster.store_job(first=2)
    assert len(job.ops) == 2


def test_other_groups_are_not_stored_after_a_gap_of_a_full_attention_group() -> None:
    cluster = open_cluster(slots=[8, 1], groups=[("sliding", trailing(4)), ("full", ALL)])
    stored = cluster.store(ABCD, "x")
    assert stored.accepted == CHUNK
    assert stored.skipped == {"full": 1, "parent": 5}


def test_arenas_are_counted_by_state() -> None:
    cluster = open_cluster(slots=4)
    cluster.have(chain("one", "a"))
    job = cluster.store_job(chain("one", "xy"))
    assert cluster.index.arenas() == [{"free": 1, "writing": 2, "ready": 1, "evicting": 0}]
    cluster.index.clear(None, 0.0)
    assert cluster.index.arenas() == [{"free": 2, "writing": 0, "ready": 0, "evicting": 2}]
    cluster.complete(job, OK)
    assert cluster.index.arenas() == [{"free": 4, "writing": 0, "ready": 0, "evicting": 0}]


def test_cross_attention_keeps_the_one_object_of_the_first_chunk() -> None:
    cluster = open_cluster(groups=[("cross", HitRule("whole"))])
    assert len(cluster.store_job().ops) == 1


def test_chunks_outside_of_the_chain_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"chunks \[0, 5\) are not part of a chain of 4"):
        open_cluster().index.begin_store("x", ABCD, first=0, last=5, now=0.0)


# -------------------------------------------------------------------- lookup and lease


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (16, (16, "end")),
        (18, (16, "tail")),
        (15, (12, "max_tokens")),
        (4, (4, "max_tokens")),
        (3, (0, "max_tokens")),
        (-1, (0, "max_tokens")),
    ],
)
def test_a_hit_ends_at_the_last_chunk_boundary_within_the_requested_tokens(
    tokens: int, expected: tuple[int, str]
) -> None:
    cluster = open_cluster()
    cluster.have()
    assert cluster.lookup(tokens=tokens)[1:] == expected


def test_a_lease_expires_and_another_lookup_renews_it() -> None:
    cluster = open_cluster(slots=4, lease_ttl=10.0)
    cluster.have()
    cluster.lookup()
    cluster.now = 9.0
    cluster.lookup()
    cluster.later(2.0)
    assert cluster.index.stats()["leases"] == 1
    cluster.later(8.0)
    assert cluster.index.stats()["leases"] == 0
    assert cluster.load() is None


def test_an_expired_lease_cannot_be_loaded_even_without_a_tick() -> None:
    cluster = open_cluster(lease_ttl=10.0)
    cluster.have()
    cluster.lookup()
    cluster.now = 10.0
    assert cluster.load() is None
    assert cluster.index.stats()["leases"] == 0


def test_a_second_lookup_replaces_the_lease_of_the_first() -> None:
    cluster = open_cluster()
    cluster.have()
    cluster.have(chain("two", "abcd"))
    cluster.lookup()
    cluster.lookup(chain("two", "abcd"))
    job = cluster.load_job()
    assert {op.name.namespace for op in job.ops if isinstance(op, Copy)} == {chain("two", "").namespace}
    cluster.lookup()
    cluster.lookup(chain("one", "zz"))
    assert cluster.load() is None


def test_repeated_lookups_of_a_request_count_as_one_use() -> None:
    cluster = open_cluster(slots=2, policy="lfu")
    cluster.have(chain("one", "a"))
    cluster.have(chain("one", "b"))
    for _ in range(5):
        cluster.lookup(chain("one", "a"))
    for owner in "xyz":
        cluster.lookup(chain("one", "b"), owner=owner)
        cluster.index.release(owner)
    cluster.index.release("reader")
    cluster.have(chain("one", "c"))
    assert cluster.lookup(chain("one", "a"))[2] == "evicted"


def test_a_policy_is_notified_once_per_request_even_of_a_miss() -> None:
    requests: list[tuple[int, int]] = []

    class Counting(Lru):
        def asked(self, chain: Sequence[bytes], hits: int) -> None:
            requests.append((len(chain), hits))

    cluster = open_cluster(policy=Counting)
    for _ in range(3):
        cluster.lookup(owner="a")
    cluster.have(chain("one", "ab"))
    for _ in range(2):
        cluster.lookup(owner="b")
    assert requests == [(4, 0), (4, 2)]
    cluster.lookup(chain("one", "abcde"), owner="b")
    cluster.index.forget("b")
    cluster.lookup(chain("one", "abcde"), owner="b")
    assert requests[2:] == [(5, 2), (5, 2)]
    assert not hears(Lru(8))


def test_tokens_are_counted_for_the_tier_they_come_from() -> None:
    cluster = open_cluster(slots=2, tiers=[DISK, TierInfo("far")])
    cluster.have(chain("one", "ab"))
    cluster.hold(at=[2])
    cluster.hold(tier=1, at=(2, 3))
    assert cluster.index.lookup("reader", ABCD, 16, 0.0).by_tier == {"dram": 8, "disk": 4, "far": 4}


def test_chunks_before_a_window_count_for_the_tier_of_the_window() -> None:
    cluster = open_cluster(groups=[("sliding", trailing(4))], tiers=[DISK])
    cluster.hold()
    assert cluster.index.lookup("reader", ABCD, 16, 0.0).by_tier == {"disk": 16}


# -------------------------------------------------------------------- eviction


TEXTS = st.sampled_from(["a", "ab", "abcd", "abce", "abxy", "q", "qr", "qrst"])


def test_a_parent_that_is_stored_again_has_the_children_that_stayed() -> None:
    cluster = open_cluster(slots=2)
    cluster.complete(cluster.store_job(chain("one", "ab")), FAILED, OK)
    cluster.have(chain("one", "a"))
    assert cluster.lookup(chain("one", "ab")) == ("hit", 8, "end")
    cluster.lookup(chain("one", "a"))  # now only the parent is leased, and its child may be evicted
    cluster.index.release("reader")
    cluster.have(chain("one", "q"))
    assert cluster.lookup(chain("one", "ab")) == ("hit", 4, "evicted")


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(TEXTS, st.booleans(), st.integers(0, 2)), max_size=25), slots=st.integers(1, 6))
def test_children_are_evicted_before_their_parents_under_every_policy(policy: str, steps, slots: int) -> None:
    cluster = open_cluster(slots=slots, policy=policy)
    for text, store, owner in steps:
        if store:
            cluster.have(chain("one", text))
        else:
            cluster.lookup(chain("one", text), owner=str(owner))
        [space] = cluster.index.state.pools[0].spaces.values() or [None]
        if space is not None:
            extents = {extent for extent in space.held.values() if extent.state == READY}
            resident = {digest for extent in extents for digest in extent.digests}
            assert all(extent.parent is None or extent.parent in resident for extent in extents)


def test_sliding_windows_are_evicted_by_their_policy_alone() -> None:
    cluster = open_cluster(slots=4, groups=[("sliding", trailing(4))])
    cluster.have()
    cluster.lookup(chain("one", "abcd"))  # uses only the last chunk
    cluster.index.release("reader")
    cluster.have(chain("one", "q"))
    assert cluster.index.where(name_at(ABCD, 0, 3)) == ("dram",)


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("groups", "chunk", "slots", "more", "message"),
    [
        ([], 4, [], {}, "at least one"),
        ([("full", ALL)], 4, [1, 2], {}, "as many slot counts"),
        ([("full", ALL)], 0, [1], {}, "chunk_tokens=0"),
        ([("full", ALL)], 4, [-1], {}, r"slots=\[-1\]"),
        ([("full", ALL)], 4, [1], {"ranks": 0}, "ranks=0"),
        ([("full", ALL)], 4, [1], {"policy": "fifo"}, "did you mean 's3fifo'"),
    ],
)
def test_invalid_settings_are_rejected(groups, chunk, slots, more, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Index(groups, chunk, slots, **more)


class Counted(list[Any]):
    """A list that counts how many of its items are read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        self.reads += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[Any]:
        for value in super().__iter__():
            self.reads += 1
            yield value


@pytest.mark.parametrize("linked", [True, False])
def test_a_store_with_many_holes_reads_each_chunk_only_a_few_times(linked: bool) -> None:
    count = 600
    names = [number.to_bytes(32, "little") for number in range(count)]
    index = Index([("sliding", trailing(8))], CHUNK, [count])
    for resident in ([i % 2 == 0 for i in range(count)], [True] * count):
        digests, mask = Counted(names), Counted(resident)
        stored = index.begin_store(
            "a", Chain(b"n" * 32, digests, linked), first=0, last=count, now=0.0, resident=[mask]
        )
        assert stored.accepted == count // 2 * CHUNK
        assert digests.reads + mask.reads < 16 * count
    index.check()


def test_the_audit_detects_a_leaked_reference() -> None:
    cluster = open_cluster()
    cluster.have()
    next(cluster.index.state.pools[0].residents()).extent.refs += 1
    with pytest.raises(AssertionError, match="1 references counted, 0 held"):
        cluster.index.check()


@pytest.mark.parametrize("kind", ["store", "load", "prefetch"])
def test_an_exception_while_a_job_is_planned_leaves_nothing_behind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = open_cluster(slots=4, tiers=[DISK])
    if kind != "store":
        cluster.hold()
        cluster.lookup()
    taken = planner._take_slots

    def breaks(*args: Any) -> Any:
        taken(*args)
        raise RuntimeError("after the slots were taken")

    monkeypatch.setattr(planner, "_take_slots", breaks)
    begin: dict[str, Callable[[], object]] = {
        "store": lambda: cluster.index.begin_store("writer", ABCD, first=0, last=4, now=0.0),
        "load": lambda: cluster.index.begin_load("reader", 0.0),
        "prefetch": lambda: cluster.index.begin_prefetch("reader", 0.0),
    }
    with pytest.raises(RuntimeError):
        begin[kind]()
    monkeypatch.undo()
    cluster.index.forget("reader")
    cluster.index.check()
    stats = cluster.index.stats()
    assert (stats["slots_free"], stats["jobs"], stats["leases"]) == (4, 0, 0)
    assert cluster.store(ABCD).accepted == 16
