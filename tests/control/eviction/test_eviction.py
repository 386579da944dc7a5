"""Eviction policies, compared with naive ones, and the properties that a slot pool relies on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.control.eviction import POLICIES, Adaptive, Lfu, Lru, Policy, Recent, S3Fifo, Tracked, policy_factory
from lmcache.errors import ConfigError

NAMES = sorted(POLICIES)
WHAT = st.sampled_from(["add", "add", "touch", "touch", "pop", "park", "restore", "discard", "split"])
STEPS = st.lists(
    st.tuples(
        WHAT,
        st.integers(0, 99),
        st.integers(1, 4),
    ),
    max_size=60,
)


def run_of(policy: Policy, *names: bytes) -> list[Tracked]:
    run = [Tracked(name) for name in names]
    policy.add(run)
    return run


def rest_of(item: Tracked, name: bytes) -> Tracked:
    """Returns the item that a slot pool splits off from `item`."""
    rest = Tracked(name)
    rest.freq = item.freq
    return rest


def order(policy: Policy) -> list[bytes]:
    """Evicts everything; returns the keys, coldest first."""
    popped = []
    while (item := policy.pop()) is not None:
        policy.evicted(item, [item.digest])
        popped.append(item.digest)
    return popped


class NaiveLru:
    """A list, coldest first."""

    def __init__(self) -> None:
        self.items: list[Tracked] = []

    def touch(self, run) -> None:
        self.items = [i for i in self.items if i not in run] + list(reversed(run))

    def restore(self, item) -> None:
        self.items.insert(0, item)

    def split(self, item, rest) -> None:
        self.items.insert(self.items.index(item), rest)


class NaiveLfu:
    """Priorities in a dict; ties are broken by the time of assignment."""

    def __init__(self) -> None:
        self.items: list[Tracked] = []
        self.priority: dict[Tracked, int] = {}
        self.uses: dict[Tracked, int] = {}
        self.age = 0

    def touch(self, run) -> None:
        for item in reversed(run):
            self.uses[item] = self.uses.get(item, 0) + 1
            self.priority[item] = self.age + self.uses[item]
            self.items = [i for i in self.items if i is not item] + [item]
        self.items.sort(key=lambda i: self.priority[i])

    def restore(self, item) -> None:
        self.priority[item] = max(1, self.age)
        self.items.insert(0, item)
        self.items.sort(key=lambda i: self.priority[i])

    def split(self, item, rest) -> None:
        self.items.insert(self.items.index(item), rest)
        self.priority[rest], self.uses[rest] = self.priority[item], self.uses[item]

    def popped(self, item) -> None:
        self.age = self.priority[item]


@pytest.mark.parametrize(("policy", "naive"), [(Lru, NaiveLru), (Lfu, NaiveLfu)])
@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_a_policy_evicts_in_the_order_of_its_naive_model(policy, naive, steps) -> None:
    real, model = policy(0), naive()
    known: list[Tracked] = []
    aside: list[Tracked] = []

    def pop() -> Tracked | None:
        item = real.pop()
        assert item is (model.items.pop(0) if model.items else None)
        if item is not None:
            assert item.stamp == 0
            if isinstance(model, NaiveLfu):
                model.popped(item)
        return item

    for number, (what, pick, size) in enumerate(steps):
        if what == "add":
            run = [Tracked(b"%d-%d" % (number, i)) for i in range(size)]
            known += run
            real.add(run)
            model.touch(run)
        elif what == "touch" and known:
            run = list(dict.fromkeys(known[(pick + i) % len(known)] for i in range(size)))
            real.touch(run)
            model.touch(run)
            aside = [item for item in aside if item not in run]
        elif what in ("pop", "park"):
            item = pop()
            if item is not None and what == "pop":
                known.remove(item)
            elif item is not None:
                aside.append(item)
        elif what == "restore" and aside:
            item = aside.pop(pick % len(aside))
            real.restore(item)
            model.restore(item)
        elif what == "discard" and known:
            item = known.pop(pick % len(known))
            real.discard(item)
            model.items = [i for i in model.items if i is not item]
            aside = [i for i in aside if i is not item]
        elif what == "split" and known and (item := known[pick % len(known)]).stamp:
            rest = rest_of(item, b"%d" % number)
            known.append(rest)
            real.split(item, rest)
            model.split(item, rest)
        assert sorted(map(id, real.members())) == sorted(map(id, model.items))
        assert all(bool(item.stamp) == (item not in aside) for item in known)
    while model.items:
        pop()
    assert real.pop() is None


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_every_policy_evicts_each_resident_object_exactly_once(name, steps) -> None:
    policy = policy_factory(name)(10)
    queued: dict[int, Tracked] = {}
    aside: dict[int, Tracked] = {}
    for number, (what, pick, size) in enumerate(steps):
        resident = [*queued.values(), *aside.values()]
        if what == "add":
            run = [Tracked(b"%d" % ((pick + i) % 30)) for i in range(size)]
            policy.add(run)
            queued |= {id(item): item for item in run}
        elif what == "touch" and resident:
            policy.touch([resident[pick % len(resident)]])
        elif what in ("pop", "park"):
            item = policy.pop()
            assert (item is None) == (not queued)
            if item is not None:
                del queued[id(item)]
                if what == "park":
                    aside[id(item)] = item
        elif what == "restore" and aside:
            item = aside.pop(list(aside)[pick % len(aside)])
            policy.restore(item)
            queued[id(item)] = item
        elif what == "discard" and resident:
            item = resident[pick % len(resident)]
            policy.discard(item)
            queued.pop(id(item), None)
            aside.pop(id(item), None)
        elif what == "split" and queued:
            item = list(queued.values())[pick % len(queued)]
            rest = rest_of(item, b"%d" % number)
            policy.split(item, rest)
            queued[id(rest)] = rest
        for key in [key for key, item in aside.items() if item.stamp]:  # a touch may restore it
            queued[key] = aside.pop(key)
        assert all(item.stamp for item in queued.values()), f"step {number}"
        assert sorted(map(id, policy.members())) == sorted(queued)
    left = []
    while (item := policy.pop()) is not None:
        left.append(id(item))
    assert sorted(left) == sorted(queued)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_of_an_extent_is_evicted_first_so_that_children_leave_before_parents(name: str) -> None:
    policy = policy_factory(name)(100)
    run_of(policy, b"a", b"b", b"c")
    assert order(policy) == [b"c", b"b", b"a"]


@pytest.mark.parametrize("name", NAMES)
def test_the_second_part_of_a_split_keeps_its_position_and_is_evicted_first(name: str) -> None:
    policy = policy_factory(name)(100)
    run_of(policy, b"cold")
    [item] = run_of(policy, b"item")
    run_of(policy, b"hot")
    policy.split(item, rest_of(item, b"rest"))
    assert order(policy) == [b"cold", b"rest", b"item", b"hot"]


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_an_item_is_evicted_next(name: str) -> None:
    policy = policy_factory(name)(100)
    run_of(policy, b"a", b"b")
    run_of(policy, b"c")
    item = policy.pop()
    assert item is not None
    policy.evicted(item, [b"its last object"])
    policy.restore(item)
    assert order(policy) == [b"b", b"a", b"c"]


def test_the_rest_of_an_item_stays_in_its_queue() -> None:
    s3fifo, adaptive = S3Fifo(10), Adaptive(10)
    run_of(s3fifo, b"a")
    order(s3fifo)
    for policy in (s3fifo, adaptive):
        [item] = run_of(policy, b"a")  # s3fifo evicted it not long ago: it is in the main queue
        stamp = item.stamp
        for _ in range(2):
            assert policy.pop() is item
            policy.evicted(item, [b"its last object"])
            policy.restore(item)
            assert item.stamp == stamp
        assert policy.pop() is item
        policy.restore(item)  # it was aside for some time
        assert order(policy) == [b"a"]


def test_lru_keeps_what_was_used_last() -> None:
    policy = Lru(10)
    a, _, _ = run_of(policy, b"a", b"b", b"c")
    policy.touch([a])
    run_of(policy, b"d")
    assert order(policy) == [b"c", b"b", b"a", b"d"]


def test_lfu_keeps_what_is_used_often_but_not_forever() -> None:
    policy = Lfu(10)
    [hot] = run_of(policy, b"hot")
    for _ in range(5):
        policy.touch([hot])
    run_of(policy, b"new")
    item = policy.pop()
    assert item is not None
    assert item.digest == b"new"
    for i in range(20):  # newcomers, each evicted after a use or two: their priorities rise with the age
        [item] = run_of(policy, b"%d" % i)
        policy.touch([item])
        popped = policy.pop()
        if popped is hot:
            return
    pytest.fail("an object that was popular long ago was never evicted")


def test_s3fifo_survives_a_scan() -> None:
    policy = S3Fifo(10)
    hot = run_of(policy, *(b"h%d" % i for i in range(5)))
    for _ in range(2):
        policy.touch(hot)
    resident = 5
    for i in range(100):
        run_of(policy, b"scan%d" % i)
        resident += 1
        while resident > 10:
            policy.pop()
            resident -= 1
    assert {item.digest for item in policy.members()} >= {item.digest for item in hot}


def test_s3fifo_inserts_what_it_evicted_recently_into_the_main_queue() -> None:
    policy = S3Fifo(10)
    run_of(policy, b"a")
    assert order(policy) == [b"a"]
    run_of(policy, b"a")
    run_of(policy, b"c", b"b")
    assert order(policy) == [b"b", b"a", b"c"]  # as a new object it would have been evicted first


def test_an_unknown_policy_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'lruu'.*did you mean 'lru'.*lfu"):
        policy_factory("lruu")


def test_recent_keeps_the_last_entries_and_drops_old_ones() -> None:
    recent = Recent(10)
    for i in range(100):
        recent.put(b"%d" % i, f"note {i}")
    assert [recent.get(b"%d" % i) for i in range(90, 100)] == [f"note {i}" for i in range(90, 100)]
    assert recent.get(b"50") is None
    recent.put(b"99", "newer")
    assert recent.get(b"99") == "newer"


def test_recent_stays_within_its_bounds_when_many_entries_are_added_at_once() -> None:
    recent = Recent(10)
    names = [b"%d" % i for i in range(45)]
    recent.put_all(names, "gone")
    kept = [name for name in names if recent.get(name)]
    assert kept == names[-15:]
    recent.put_all(names[:3], "again")
    recent.put(names[0], "later")
    assert [recent.get(name) for name in names[:3]] == ["later", "again", "again"]
