"""What the index promises of stores, lookups and leases, one promise a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexdriver import ABCD, DISK, FAILED, LATE, OK, Lab, places

from lmcache.control import Index, TierInfo
from lmcache.control.eviction import POLICIES, Lru, hears
from lmcache.control.extents import READY
from lmcache.errors import ConfigError
from lmcache.plan import ArenaSlot, Chain, Copy
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

# -------------------------------------------------------------------- store


def test_what_was_stored_is_a_hit_once_every_rank_has_acknowledged_it() -> None:
    lab = Lab(ranks=2)
    assert lab.look() == ("miss", 0, "absent")
    job = lab.store()
    assert places(job) == [("Engine", "ArenaSlot", i * CHUNK) for i in range(4)]
    assert lab.look() == ("miss", 0, "writing")
    assert lab.answer(job, OK, rank=1) == []
    assert lab.look() == ("miss", 0, "writing")
    [ended] = lab.answer(job, OK, rank=0)
    assert (ended.kind, ended.owner, ended.ok_tokens, ended.final) == ("store", "store", 16, True)
    assert lab.look() == ("hit", 16, "end")


def test_one_rank_that_fails_to_store_an_object_makes_it_vanish_for_all() -> None:
    lab = Lab(ranks=2)
    job = lab.store()
    lab.answer(job, OK, rank=0)
    lab.answer(job, OK, OK, FAILED, OK, rank=1)
    assert lab.look() == ("hit", 8, "failed")


def test_a_report_with_too_few_statuses_counts_as_failed() -> None:
    lab = Lab()
    job = lab.store()
    lab.answer(job, OK, OK)
    assert lab.look() == ("miss", 0, "failed")


def test_a_slot_is_not_reused_while_a_hung_write_may_still_reach_it() -> None:
    lab = Lab(slots=1)
    hung = lab.store(chain("one", "a"))
    lab.answer(hung, LATE, final=False)
    refused = lab.index.begin_store("x", chain("one", "b"), first=0, last=1, now=0.0)
    assert (refused.job, refused.accepted, refused.skipped) == (None, 0, {"full": 1})
    lab.answer(hung, LATE, final=True)
    again = lab.store(chain("one", "b"))
    before, after = hung.ops[0], again.ops[0]
    assert isinstance(before, Copy)
    assert isinstance(after, Copy)
    assert isinstance(before.dst, ArenaSlot)
    assert isinstance(after.dst, ArenaSlot)
    assert after.dst.index == before.dst.index
    assert after.dst.generation > before.dst.generation


def test_only_what_is_absent_is_copied_and_the_rest_is_counted_by_reason() -> None:
    lab = Lab(slots=5)
    lab.have(chain("one", "ab"))
    resident = [[True, True, True, True, False, True]]
    stored = lab.index.begin_store("x", chain("one", "abcdef"), first=0, last=6, now=0.0, resident=resident)
    assert stored.accepted == 2 * CHUNK
    assert stored.skipped == {"present": 2, "resident": 1, "parent": 1}


def test_a_store_that_does_not_fit_keeps_the_beginning_of_the_chain() -> None:
    lab = Lab(slots=3)
    stored = lab.index.begin_store("x", chain("one", "abcdef"), first=0, last=6, now=0.0)
    assert stored.accepted == 3 * CHUNK
    assert stored.skipped == {"full": 1, "parent": 2}
    lab.settle()
    assert lab.look(chain("one", "abcdef")) == ("hit", 3 * CHUNK, "absent")


def test_a_parent_is_never_evicted_to_make_room_for_its_child() -> None:
    lab = Lab(slots=2)
    lab.have(chain("one", "ab"))
    stored = lab.index.begin_store("x", chain("one", "abc"), first=2, last=3, now=0.0)
    assert stored.skipped == {"full": 1}
    assert lab.look(chain("one", "ab")) == ("hit", 8, "end")


def test_the_chunk_after_a_gap_is_not_stored_but_one_whose_parent_lies_in_a_tier_is() -> None:
    lab = Lab(tiers=[DISK])
    stored = lab.index.begin_store("x", ABCD, first=2, last=4, now=0.0)
    assert stored.skipped == {"parent": 2}
    lab.on_tier(chain("one", "ab"))
    job = lab.store(first=2)
    assert len(job.ops) == 2


def test_other_groups_are_not_stored_behind_a_gap_of_a_full_attention_group() -> None:
    lab = Lab(slots=[8, 1], groups=[("sliding", trailing(4)), ("full", ALL)])
    stored = lab.index.begin_store("x", ABCD, first=0, last=4, now=0.0)
    assert stored.accepted == CHUNK
    assert stored.skipped == {"full": 1, "parent": 5}


def test_arenas_are_counted_by_state() -> None:
    lab = Lab(slots=4)
    lab.have(chain("one", "a"))
    job = lab.store(chain("one", "xy"))
    assert lab.index.arenas() == [{"free": 1, "writing": 2, "ready": 1, "evicting": 0}]
    lab.index.clear(None, 0.0)
    assert lab.index.arenas() == [{"free": 2, "writing": 0, "ready": 0, "evicting": 2}]
    lab.answer(job, OK)
    assert lab.index.arenas() == [{"free": 4, "writing": 0, "ready": 0, "evicting": 0}]


def test_cross_attention_keeps_the_one_object_of_the_first_chunk() -> None:
    lab = Lab(groups=[("cross", HitRule("whole"))])
    assert len(lab.store().ops) == 1


def test_chunks_outside_of_the_chain_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks \[0, 5\) are not part of a chain of 4"):
        Lab().index.begin_store("x", ABCD, first=0, last=5, now=0.0)


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
def test_a_hit_ends_at_the_last_boundary_that_was_asked_for(tokens: int, expected: tuple[int, str]) -> None:
    lab = Lab()
    lab.have()
    assert lab.look(tokens=tokens)[1:] == expected


def test_another_salt_is_a_miss_even_where_the_engines_own_digests_are_equal() -> None:
    lab = Lab()
    lab.have()
    other = chain("two", "abcd")
    assert other.digests == ABCD.digests
    assert lab.look(other) == ("miss", 0, "absent")


def test_a_leased_object_is_not_evicted_until_the_lease_is_released() -> None:
    lab = Lab(slots=4)
    lab.have()
    lab.look()
    assert lab.index.begin_store("x", chain("one", "q"), first=0, last=1, now=0.0).skipped == {"full": 1}
    lab.index.release("me")
    lab.index.release("me")
    lab.have(chain("one", "q"))
    assert lab.look(owner="other") == ("hit", 12, "evicted")


def test_a_lease_expires_and_renewing_it_starts_its_time_anew() -> None:
    lab = Lab(slots=4, lease_ttl=10.0)
    lab.have()
    lab.look()
    lab.now = 9.0
    lab.look()
    lab.index.tick(11.0)
    assert lab.index.stats()["leases"] == 1
    lab.index.tick(19.0)
    assert lab.index.stats()["leases"] == 0
    assert lab.index.begin_load("me", 19.0) is None


def test_an_expired_lease_cannot_be_loaded_even_if_nobody_ticked() -> None:
    lab = Lab(lease_ttl=10.0)
    lab.have()
    lab.look()
    assert lab.index.begin_load("me", 10.0) is None
    assert lab.index.stats()["leases"] == 0


def test_a_second_lookup_replaces_the_first_ones_lease() -> None:
    lab = Lab()
    lab.have()
    lab.have(chain("two", "abcd"))
    lab.look()
    lab.look(chain("two", "abcd"))
    job = lab.load()
    assert {op.name.namespace for op in job.ops if isinstance(op, Copy)} == {chain("two", "").namespace}
    lab.look()
    lab.look(chain("one", "zz"))
    assert lab.index.begin_load("me", 0.0) is None


def test_asking_again_and_again_counts_as_one_use() -> None:
    lab = Lab(slots=2, policy="lfu")
    lab.have(chain("one", "a"))
    lab.have(chain("one", "b"))
    for _ in range(5):
        lab.look(chain("one", "a"))
    for owner in "xyz":
        lab.look(chain("one", "b"), owner=owner)
        lab.index.release(owner)
    lab.index.release("me")
    lab.have(chain("one", "c"))
    assert lab.look(chain("one", "a"))[2] == "evicted"


def test_a_policy_hears_once_of_each_request_also_of_one_that_misses() -> None:
    heard: list[tuple[int, int]] = []

    class Curious(Lru):
        def asked(self, chain: Sequence[bytes], hits: int) -> None:
            heard.append((len(chain), hits))

    lab = Lab(policy=Curious)
    for _ in range(3):
        lab.look(owner="a")
    lab.have(chain("one", "ab"))
    for _ in range(2):
        lab.look(owner="b")
    assert heard == [(4, 0), (4, 2)]
    lab.look(chain("one", "abcde"), owner="b")
    lab.index.forget("b")
    lab.look(chain("one", "abcde"), owner="b")
    assert heard[2:] == [(5, 2), (5, 2)]
    assert not hears(Lru(8))


def test_tokens_are_attributed_to_the_place_they_come_from() -> None:
    lab = Lab(slots=2, tiers=[DISK, TierInfo("far")])
    lab.have(chain("one", "ab"))
    lab.index.announce(0, 0, [name_at(ABCD, 0, 2)], True, 0.0)
    lab.index.announce(1, 0, [name_at(ABCD, 0, i) for i in (2, 3)], True, 0.0)
    assert lab.index.lookup("me", ABCD, 16, 0.0).by_tier == {"dram": 8, "disk": 4, "far": 4}


def test_chunks_before_a_window_count_for_where_the_window_lies() -> None:
    lab = Lab(groups=[("sliding", trailing(4))], tiers=[DISK])
    lab.on_tier()
    assert lab.index.lookup("me", ABCD, 16, 0.0).by_tier == {"disk": 16}


def test_a_hit_is_legal_for_every_group_and_says_which_one_ends_it() -> None:
    lab = Lab(groups=[("full", ALL), ("mamba", HitRule("state_at"))])
    resident = [[True] * 4, [False, True, False, False]]
    lab.have(resident=resident)
    assert lab.look() == ("hit", 8, "group")
    assert [op.name.group for op in lab.load().ops if isinstance(op, Copy)] == [0, 0, 1]


# -------------------------------------------------------------------- eviction


TEXTS = st.sampled_from(["a", "ab", "abcd", "abce", "abxy", "q", "qr", "qrst"])


def test_a_parent_that_comes_back_has_the_children_that_stayed() -> None:
    lab = Lab(slots=2)
    lab.answer(lab.store(chain("one", "ab")), FAILED, OK)
    lab.have(chain("one", "a"))
    assert lab.look(chain("one", "ab")) == ("hit", 8, "end")
    lab.look(chain("one", "a"))  # the parent alone is leased to "me" now, and its child may go
    lab.index.release("me")
    lab.have(chain("one", "q"))
    assert lab.look(chain("one", "ab")) == ("hit", 4, "evicted")


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(TEXTS, st.booleans(), st.integers(0, 2)), max_size=25), slots=st.integers(1, 6))
def test_children_leave_before_their_parents_whatever_the_policy(policy: str, steps, slots: int) -> None:
    lab = Lab(slots=slots, policy=policy)
    for text, store, owner in steps:
        if store:
            lab.have(chain("one", text))
        else:
            lab.look(chain("one", text), owner=str(owner))
        [space] = lab.index.state.pools[0].spaces.values() or [None]
        if space is not None:
            runs = {run for run in space.held.values() if run.state == READY}
            resident = {digest for run in runs for digest in run.digests}
            assert all(run.parent is None or run.parent in resident for run in runs)


def test_sliding_windows_are_evicted_by_their_policy_alone() -> None:
    lab = Lab(slots=4, groups=[("sliding", trailing(4))])
    lab.have()
    lab.look(chain("one", "abcd"))  # uses only the last chunk
    lab.index.release("me")
    lab.have(chain("one", "q"))
    assert lab.index.where(name_at(ABCD, 0, 3)) == ("dram",)


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
def test_impossible_settings_are_refused(groups, chunk, slots, more, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Index(groups, chunk, slots, **more)


class Counted(list[Any]):
    """A list that knows how often something of it was read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        self.reads += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[Any]:
        for value in super().__iter__():
            self.reads += 1
            yield value


@pytest.mark.parametrize("linked", [True, False])
def test_a_store_with_many_holes_looks_at_each_chunk_a_few_times(linked: bool) -> None:
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


def test_the_audit_notices_a_leaked_reference() -> None:
    lab = Lab()
    lab.have()
    next(lab.index.state.pools[0].residents()).extent.refs += 1
    with pytest.raises(AssertionError, match="1 references counted, 0 held"):
        lab.index.check()
