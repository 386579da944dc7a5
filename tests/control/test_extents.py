"""Extents: splitting one keeps its pins, and no object or slot is lost, duplicated or reused while it is pinned."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.control import invariants
from lmcache.control import slot_pool as arenas
from lmcache.control.eviction import POLICIES, Lru, S3Fifo, policy_factory
from lmcache.control.extents import READY, Extent, ExtentPin, extents_of
from lmcache.control.slot_pool import SlotPool
from lmcache.plan import Chain
from lmcache.spec import HitRule
from lmcache_conformance.labs.index_cluster import FAILED, OK, open_cluster
from lmcache_conformance.labs.indexlab import CHUNK, chain

TEXTS = ["abcdefgh", "abcdxyz", "abq", "rstuvw", "rsz"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "pin", "pin", "use", "unpin", "fail", "finish", "clear"]),
        st.sampled_from(TEXTS),
        st.integers(0, 8),
        st.integers(0, 8),
    ),
    max_size=40,
)
Objects = dict[bytes, tuple[int, int]]
"""Digest → (slot, generation), at the time of the pin."""


class Arena:
    """A pool, and a model of it object by object."""

    def __init__(self, slots: int, policy: str, *, chained: bool, linked: bool) -> None:
        self.pool = SlotPool(slots, policy_factory(policy)(slots), chained=chained)
        self.pool.notice = self.notice
        self.linked = linked
        self.there: set[bytes] = set()
        self.pinned: list[tuple[list[ExtentPin], Objects, bool]] = []

    def notice(self, there: bool, namespace: bytes, digest: bytes) -> None:
        assert (digest in self.there) != there, "notified twice"
        (self.there.add if there else self.there.remove)(digest)

    def chain(self, text: str) -> Chain:
        about = chain("one", text)
        if self.linked:
            return about
        return about._replace(digests=[letter.encode() * 32 for letter in text], linked=False)

    def store(self, text: str, first: int, last: int) -> None:
        """Begins to write what is absent of a range, from its first absent object on."""
        about = self.chain(text)
        last = min(last, len(text))
        while first < last and self.pool.find(about.namespace, about.digests[first]) is not None:
            first += 1
        pins = self.pool.insert(about, first, self.pool.absent(about, first, last) if first < last else last)
        names = about.digests[first : first + sum(size for _, size in pins)]
        self.pin(pins, list(names), writes=True)

    def pin(self, pins: list[ExtentPin], names: list[bytes], *, writes: bool) -> None:
        held = {digest: (slot, gen) for extent in extents_of(pins) for digest, slot, gen, _ in extent.objects()}
        assert sorted(held) == sorted(set(names)), "other objects were pinned"
        self.pinned.append((pins, held, writes))

    def extents(self, text: str, first: int, last: int) -> tuple[list[Extent], list[bytes]]:
        about = self.chain(text)
        digests = list(about.digests)
        last = min(last, len(digests))
        ready = [d for d in digests[first:last] if (found := self.pool.find(about.namespace, d)) and found.ready]
        return self.pool.carve(self.pool.present(about.namespace, digests, first, last)), ready

    def check(self) -> None:
        for pins, held, _ in self.pinned:
            now = {digest: (slot, gen) for extent in extents_of(pins) for digest, slot, gen, _ in extent.objects()}
            assert now == held, "a pin covers other objects than at first"
        slots = [slot for slot, _ in {held for _, mine, _ in self.pinned for held in mine.values()}]
        assert len(slots) == len(set(slots)), "a slot was reused while it was pinned"
        assert not set(slots) & set(self.pool.free), "a slot is free while it is pinned"
        refs = Counter(extent for pins, _, _ in self.pinned for extent in extents_of(pins))
        invariants.check_pool("pool", self.pool, refs)
        ready = {held.digest for held in self.pool.residents() if held.ready}
        assert ready == self.there, "notifications differ from what is ready"
        if isinstance(self.pool.policy, S3Fifo):
            small = [item for item in self.pool.policy.members() if item.stamp == S3Fifo._SMALL]
            assert self.pool.policy._small == sum(item.size for item in small)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    slots=st.integers(1, 14),
    chained=st.booleans(),
    linked=st.booleans(),
    longest=st.sampled_from([2, 3, 256]),
)
def test_however_extents_are_split_every_pin_covers_the_same_objects(
    policy: str, steps, slots: int, chained: bool, linked: bool, longest: int
) -> None:
    arena = Arena(slots, policy, chained=chained, linked=linked)
    pool, namespace = arena.pool, chain("one", "a").namespace
    with patch.object(arenas, "LONGEST", longest):
        for what, text, a, b in steps:
            first, last = min(a, b), max(a, b)
            if what == "store":
                arena.store(text, 0 if chained and linked and a < 6 else first, last)
            elif what == "pin":
                extents, names = arena.extents(text, first, last)
                arena.pin(pool.pin(extents), names, writes=False)
                pool.touch(extents)
            elif what == "use":
                pool.touch(arena.extents(text, first, last)[0])
            elif what == "unpin" and arena.pinned:
                pins, _, writes = arena.pinned.pop(a % len(arena.pinned))
                if writes:
                    pool.publish(pins)
                pool.unpin(pins)
            elif what == "finish":
                for pins, _, writes in arena.pinned:
                    if writes:
                        pool.publish(pins)
            elif what == "fail":
                about = arena.chain(text)
                at = a % len(text)
                found = pool.find(namespace, about.digests[at], about.depth(at))
                if found is not None:
                    pool.drop(namespace, found.digest, about.depth(at), found.generation - (b == 0), "failed")
                    gone = pool.find(namespace, about.digests[at], about.depth(at)) is None
                    assert gone == (b != 0), "an object of another generation stays"
                    assert not gone or pool.gone.get(about.digests[at]) == "failed"
            elif what == "clear" and a == b:
                pool.clear(namespace)
                assert not list(pool.residents())
            arena.check()
    for pins, _, writes in arena.pinned:
        if writes:
            pool.publish(pins)
        pool.unpin(pins)
    arena.pinned.clear()
    arena.check()
    assert not pool.leaving
    assert pool.writing == 0
    # Nothing is pinned: all slots can be reused.
    fresh = Chain(b"n" * 32, [b"%032d" % i for i in range(slots)])
    assert sum(size for _, size in pool.insert(fresh, 0, slots)) == slots


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_lease_of_a_prefix_does_not_keep_the_rest(policy: str) -> None:
    cluster = open_cluster(slots=4, policy=policy)
    cluster.have(chain("one", "abcd"))
    assert cluster.lookup(chain("one", "abcd"), owner="all") == ("hit", 16, "end")
    assert cluster.lookup(chain("one", "ab"), owner="half") == ("hit", 8, "end")
    cluster.index.check()
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    cluster.index.release("all")
    cluster.have(chain("one", "qr"))
    assert cluster.lookup(chain("one", "abcd"), owner="again") == ("hit", 8, "evicted")
    assert cluster.store(chain("one", "s"), "x").accepted == CHUNK
    cluster.index.check()


def test_a_lease_covers_parts_that_are_split_off_later() -> None:
    cluster = open_cluster(slots=6)
    cluster.have(chain("one", "abcdef"))
    cluster.lookup(chain("one", "abcdef"), owner="all")
    for text in ("abcde", "abcd", "abc", "ab", "a"):
        cluster.lookup(chain("one", text), owner=text)
        cluster.index.release(text)
    cluster.index.check()
    assert cluster.store(chain("one", "q"), "x").skipped == {"full": 1}
    job = cluster.index.begin_load("all", 0.0)
    assert job is not None
    cluster.index.check()


def test_a_branch_keeps_the_prefix_it_depends_on() -> None:
    cluster = open_cluster(slots=6)
    cluster.have(chain("one", "abcd"))
    cluster.have(chain("one", "abxy"))
    space = cluster.index.state.pools[0].spaces[chain("one", "a").namespace]
    assert sorted(len(extent.digests) for extent in set(space.held.values())) == [2, 2, 2]
    cluster.have(chain("one", "qrst"))
    assert cluster.lookup(chain("one", "abcd")) == ("hit", 8, "evicted")
    assert cluster.lookup(chain("one", "abxy")) == ("hit", 8, "evicted")


def test_a_parent_that_is_stored_again_within_a_range_has_the_children_that_stayed() -> None:
    cluster = open_cluster(slots=7)
    cluster.have(chain("one", "abxy"))
    pool, about = cluster.index.state.pools[0], chain("one", "abcd")
    for i in range(2):
        found = pool.find(about.namespace, about.digests[i])
        assert found is not None
        pool.drop(about.namespace, about.digests[i], i, found.generation, "failed")
    cluster.index.check()
    cluster.have(about)
    cluster.index.check()
    assert cluster.lookup(chain("one", "abxy")) == ("hit", 16, "end")
    assert cluster.lookup(about) == ("hit", 16, "end")


def test_an_object_that_fails_in_the_middle_of_an_extent_is_dropped_alone() -> None:
    cluster = open_cluster(slots=6)
    cluster.complete(cluster.store_job(chain("one", "abcdef")), OK, OK, FAILED, OK, OK, OK)
    cluster.index.check()
    assert cluster.lookup(chain("one", "abcdef")) == ("hit", 8, "failed")
    cluster.index.release("reader")
    assert cluster.index.stats()["slots_free"] == 1
    cluster.have(chain("one", "abcdef"))
    assert cluster.lookup(chain("one", "abcdef")) == ("hit", 24, "end")


def test_unlinked_digests_may_repeat_and_come_in_any_order() -> None:
    cluster = open_cluster(slots=8)
    a, b, c = (letter * 32 for letter in (b"a", b"b", b"c"))
    cluster.have(Chain(b"n" * 32, [a, b, a, c, c], linked=False))
    assert cluster.index.stats()["slots_free"] == 5
    for names in ([c, b, a], [a, a, b], [b, c, b, a], [a, b, c]):
        assert cluster.lookup(Chain(b"n" * 32, names, linked=False))[:2] == ("hit", len(names) * CHUNK)
        cluster.index.check()


def test_a_window_in_the_middle_of_an_extent_is_kept_without_its_ends() -> None:
    cluster = open_cluster(slots=6, groups=[("window", HitRule("trailing", 2 * CHUNK))])
    cluster.have(chain("one", "abcdef"))
    assert cluster.lookup(chain("one", "abcd")) == ("hit", 16, "end")
    cluster.have(chain("one", "pqrs"))
    cluster.index.check()
    assert [
        cluster.index.state.pools[0].find(chain("one", "a").namespace, d) is not None
        for d in chain("one", "abcdef").digests
    ] == [
        *[False, False],
        *[True, True],
        *[False, False],
    ]


def test_a_long_chain_is_a_few_extents_and_a_lookup_takes_a_few_steps() -> None:
    pool = SlotPool(1000, Lru(1000), chained=True)
    about = Chain(b"n" * 32, [b"%032d" % i for i in range(1000)])
    pins = pool.insert(about, 0, 1000)
    assert [size for _, size in pins] == [256, 256, 256, 232]
    pool.publish(pins)
    pool.unpin(pins)
    assert all(extent.state == READY for extent, _ in pins)
    assert len(list(pool.walk(about.namespace, list(about.digests), 0, 1000))) == 4
    [_, extent, at, size], *_ = pool.walk(about.namespace, list(about.digests), 300, 310)
    assert (extent, at, size) == (pins[1][0], 44, 10)


def test_the_reason_of_each_dropped_object_is_remembered() -> None:
    pool = SlotPool(4, Lru(4), chained=True)
    for text in ("abcd", "xyz"):
        about = chain("one", text)
        pins = pool.insert(about, 0, len(text))
        pool.publish(pins)
        pool.unpin(pins)
    assert [pool.gone.get(digest) for digest in chain("one", "abcd").digests] == [None, "evicted", "evicted", "evicted"]
