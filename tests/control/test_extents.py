"""Runs of objects: what is split stays held by whoever held it, and nothing is lost, doubled or given away meanwhile."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexdriver import FAILED, OK, Lab

from lmcache.control import invariants
from lmcache.control import slot_pool as arenas
from lmcache.control.eviction import POLICIES, Lru, S3Fifo, policy_factory
from lmcache.control.extents import READY, Extent, ExtentPin, extents_of
from lmcache.control.slot_pool import SlotPool
from lmcache.plan import Chain
from lmcache.spec import HitRule
from lmcache_conformance.labs.indexlab import CHUNK, chain

TEXTS = ["abcdefgh", "abcdxyz", "abq", "rstuvw", "rsz"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "hold", "hold", "use", "let go", "fail", "finish", "clear"]),
        st.sampled_from(TEXTS),
        st.integers(0, 8),
        st.integers(0, 8),
    ),
    max_size=40,
)
Held = dict[bytes, tuple[int, int]]
"""ResidentObject → (slot, generation), as somebody took hold of it."""


class Arena:
    """A pool, and what is known of it object by object."""

    def __init__(self, slots: int, policy: str, *, chained: bool, linked: bool) -> None:
        self.pool = SlotPool(slots, policy_factory(policy)(slots), chained=chained)
        self.pool.notice = self.notice
        self.linked = linked
        self.there: set[bytes] = set()
        self.holders: list[tuple[list[ExtentPin], Held, bool]] = []

    def notice(self, there: bool, namespace: bytes, digest: bytes) -> None:
        assert (digest in self.there) != there, "told twice"
        (self.there.add if there else self.there.remove)(digest)

    def chain(self, text: str) -> Chain:
        about = chain("one", text)
        if self.linked:
            return about
        return about._replace(digests=[letter.encode() * 32 for letter in text], linked=False)

    def store(self, text: str, first: int, last: int) -> None:
        """Begin to write what is absent of a stretch, from its first absent object on."""
        about = self.chain(text)
        last = min(last, len(text))
        while first < last and self.pool.find(about.namespace, about.digests[first]) is not None:
            first += 1
        spans = self.pool.insert(about, first, self.pool.absent(about, first, last) if first < last else last)
        names = about.digests[first : first + sum(size for _, size in spans)]
        self.hold(spans, list(names), writes=True)

    def hold(self, spans: list[ExtentPin], names: list[bytes], *, writes: bool) -> None:
        held = {digest: (slot, gen) for run in extents_of(spans) for digest, slot, gen, _ in run.objects()}
        assert sorted(held) == sorted(set(names)), "something else was taken hold of"
        self.holders.append((spans, held, writes))

    def runs(self, text: str, first: int, last: int) -> tuple[list[Extent], list[bytes]]:
        about = self.chain(text)
        digests = list(about.digests)
        last = min(last, len(digests))
        ready = [d for d in digests[first:last] if (found := self.pool.find(about.namespace, d)) and found.ready]
        return self.pool.carve(self.pool.present(about.namespace, digests, first, last)), ready

    def check(self) -> None:
        for spans, held, _ in self.holders:
            now = {digest: (slot, gen) for run in extents_of(spans) for digest, slot, gen, _ in run.objects()}
            assert now == held, "somebody holds something else than he took"
        slots = [slot for slot, _ in {held for _, mine, _ in self.holders for held in mine.values()}]
        assert len(slots) == len(set(slots)), "a slot was given away while somebody held it"
        assert not set(slots) & set(self.pool.free), "a slot is free while somebody holds it"
        refs = Counter(run for spans, _, _ in self.holders for run in extents_of(spans))
        invariants.check_pool("pool", self.pool, refs)
        ready = {held.digest for held in self.pool.residents() if held.ready}
        assert ready == self.there, "told otherwise"
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
def test_whatever_is_split_everybody_holds_what_he_took(
    policy: str, steps, slots: int, chained: bool, linked: bool, longest: int
) -> None:
    arena = Arena(slots, policy, chained=chained, linked=linked)
    pool, namespace = arena.pool, chain("one", "a").namespace
    with patch.object(arenas, "LONGEST", longest):
        for what, text, a, b in steps:
            first, last = min(a, b), max(a, b)
            if what == "store":
                arena.store(text, 0 if chained and linked and a < 6 else first, last)
            elif what == "hold":
                runs, names = arena.runs(text, first, last)
                arena.hold(pool.pin(runs), names, writes=False)
                pool.touch(runs)
            elif what == "use":
                pool.touch(arena.runs(text, first, last)[0])
            elif what == "let go" and arena.holders:
                spans, _, writes = arena.holders.pop(a % len(arena.holders))
                if writes:
                    pool.publish(spans)
                pool.unpin(spans)
            elif what == "finish":
                for spans, _, writes in arena.holders:
                    if writes:
                        pool.publish(spans)
            elif what == "fail":
                about = arena.chain(text)
                at = a % len(text)
                found = pool.find(namespace, about.digests[at], about.depth(at))
                if found is not None:
                    pool.drop(namespace, found.digest, about.depth(at), found.generation - (b == 0), "failed")
                    gone = pool.find(namespace, about.digests[at], about.depth(at)) is None
                    assert gone == (b != 0), "what is not that generation stays"
                    assert not gone or pool.gone.get(about.digests[at]) == "failed"
            elif what == "clear" and a == b:
                pool.clear(namespace)
                assert not list(pool.residents())
            arena.check()
    for spans, _, writes in arena.holders:
        if writes:
            pool.publish(spans)
        pool.unpin(spans)
    arena.holders.clear()
    arena.check()
    assert not pool.leaving
    assert pool.writing == 0
    # Nothing holds anything: all of it can be replaced.
    fresh = Chain(b"n" * 32, [b"%032d" % i for i in range(slots)])
    assert sum(size for _, size in pool.insert(fresh, 0, slots)) == slots


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_reader_of_a_beginning_leaves_the_rest_to_whoever_holds_it(policy: str) -> None:
    lab = Lab(slots=4, policy=policy)
    lab.have(chain("one", "abcd"))
    assert lab.look(chain("one", "abcd"), owner="all") == ("hit", 16, "end")
    assert lab.look(chain("one", "ab"), owner="half") == ("hit", 8, "end")
    lab.index.check()
    assert lab.index.begin_store("x", chain("one", "q"), first=0, last=1, now=0.0).skipped == {"full": 1}
    lab.index.release("all")
    lab.have(chain("one", "qr"))
    assert lab.look(chain("one", "abcd"), owner="again") == ("hit", 8, "evicted")
    assert lab.index.begin_store("x", chain("one", "s"), first=0, last=1, now=0.0).accepted == CHUNK
    lab.index.check()


def test_a_longer_readers_rest_is_held_though_it_was_split_off_after_it_came() -> None:
    lab = Lab(slots=6)
    lab.have(chain("one", "abcdef"))
    lab.look(chain("one", "abcdef"), owner="all")
    for text in ("abcde", "abcd", "abc", "ab", "a"):
        lab.look(chain("one", text), owner=text)
        lab.index.release(text)
    lab.index.check()
    assert lab.index.begin_store("x", chain("one", "q"), first=0, last=1, now=0.0).skipped == {"full": 1}
    job = lab.index.begin_load("all", 0.0)
    assert job is not None
    lab.index.check()


def test_a_chain_that_branches_off_keeps_what_it_hangs_on() -> None:
    lab = Lab(slots=6)
    lab.have(chain("one", "abcd"))
    lab.have(chain("one", "abxy"))
    space = lab.index.state.pools[0].spaces[chain("one", "a").namespace]
    assert sorted(len(run.digests) for run in set(space.held.values())) == [2, 2, 2]
    lab.have(chain("one", "qrst"))
    assert lab.look(chain("one", "abcd")) == ("hit", 8, "evicted")
    assert lab.look(chain("one", "abxy")) == ("hit", 8, "evicted")


def test_a_parent_that_comes_back_amid_a_stretch_has_the_children_that_stayed() -> None:
    lab = Lab(slots=7)
    lab.have(chain("one", "abxy"))
    pool, about = lab.index.state.pools[0], chain("one", "abcd")
    for i in range(2):
        found = pool.find(about.namespace, about.digests[i])
        assert found is not None
        pool.drop(about.namespace, about.digests[i], i, found.generation, "failed")
    lab.index.check()
    lab.have(about)
    lab.index.check()
    assert lab.look(chain("one", "abxy")) == ("hit", 16, "end")
    assert lab.look(about) == ("hit", 16, "end")


def test_one_object_that_fails_in_the_middle_of_a_run_leaves_alone() -> None:
    lab = Lab(slots=6)
    lab.answer(lab.store(chain("one", "abcdef")), OK, OK, FAILED, OK, OK, OK)
    lab.index.check()
    assert lab.look(chain("one", "abcdef")) == ("hit", 8, "failed")
    lab.index.release("me")
    assert lab.index.stats()["slots_free"] == 1
    lab.have(chain("one", "abcdef"))
    assert lab.look(chain("one", "abcdef")) == ("hit", 24, "end")


def test_names_that_stand_alone_may_repeat_and_come_in_any_order() -> None:
    lab = Lab(slots=8)
    a, b, c = (letter * 32 for letter in (b"a", b"b", b"c"))
    lab.have(Chain(b"n" * 32, [a, b, a, c, c], linked=False))
    assert lab.index.stats()["slots_free"] == 5
    for names in ([c, b, a], [a, a, b], [b, c, b, a], [a, b, c]):
        assert lab.look(Chain(b"n" * 32, names, linked=False))[:2] == ("hit", len(names) * CHUNK)
        lab.index.check()


def test_a_window_in_the_middle_of_a_run_is_held_without_its_ends() -> None:
    lab = Lab(slots=6, groups=[("window", HitRule("trailing", 2 * CHUNK))])
    lab.have(chain("one", "abcdef"))
    assert lab.look(chain("one", "abcd")) == ("hit", 16, "end")
    lab.have(chain("one", "pqrs"))
    lab.index.check()
    assert [
        lab.index.state.pools[0].find(chain("one", "a").namespace, d) is not None
        for d in chain("one", "abcdef").digests
    ] == [
        *[False, False],
        *[True, True],
        *[False, False],
    ]


def test_a_long_stretch_is_a_few_runs_and_a_lookup_is_a_few_steps() -> None:
    pool = SlotPool(1000, Lru(1000), chained=True)
    about = Chain(b"n" * 32, [b"%032d" % i for i in range(1000)])
    spans = pool.insert(about, 0, 1000)
    assert [size for _, size in spans] == [256, 256, 256, 232]
    pool.publish(spans)
    pool.unpin(spans)
    assert all(run.state == READY for run, _ in spans)
    assert len(list(pool.walk(about.namespace, list(about.digests), 0, 1000))) == 4
    [_, run, at, size], *_ = pool.walk(about.namespace, list(about.digests), 300, 310)
    assert (run, at, size) == (spans[1][0], 44, 10)


def test_what_left_is_remembered_with_its_reason_one_by_one() -> None:
    pool = SlotPool(4, Lru(4), chained=True)
    for text in ("abcd", "xyz"):
        about = chain("one", text)
        spans = pool.insert(about, 0, len(text))
        pool.publish(spans)
        pool.unpin(spans)
    assert [pool.gone.get(digest) for digest in chain("one", "abcd").digests] == [None, "evicted", "evicted", "evicted"]
