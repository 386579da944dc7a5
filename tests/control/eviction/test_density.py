"""The policy that keeps what promises most hits per time: never far below LRU, above it where reuse can be foretold."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_traces import SUITE, Request, Trace, chats, documents, join, shuffle

from lmcache.control.eviction import Density, Lru, Policy, Tracked
from lmcache.control.eviction import price as price_module
from lmcache.control.eviction import stake as stake_module
from lmcache.control.eviction.forecast import Forecast
from lmcache.control.eviction.shelves import BUCKETS, Ages, Run, Shelves
from lmcache.control.eviction.stake import Stake


class Object(Tracked):
    __slots__ = ("children", "parent")

    def __init__(self, digest: bytes, parent: Object | None) -> None:
        super().__init__(digest)
        self.parent = parent
        self.children = 0


def hits_of(policy: Policy, trace: Trace, capacity: int) -> int:
    """Leading blocks found resident, in an arena of `capacity` objects that evicts children before parents."""
    names: dict[int, bytes] = {}
    resident: dict[bytes, Object] = {}
    hits = 0
    for request in trace:
        for block in request.blocks:
            names.setdefault(block, blake2b(b"%d" % block, digest_size=16).digest())
        chain = [names[block] for block in request.blocks]
        found: list[Object] = []
        for name in chain:
            if name not in resident:
                break
            found.append(resident[name])
        hits += len(found)
        policy.asked(chain, len(found))
        policy.touch(found)
        parent = found[-1] if found else None
        fresh = []
        for name in chain[len(found) :]:
            assert name not in resident, "a child outlived its parent"
            parent, above = Object(name, parent), parent
            if above is not None:
                above.children += 1
            resident[name] = parent
            fresh.append(parent)
        if fresh:
            policy.add(fresh)
        while len(resident) > capacity:
            item = policy.pop()
            assert isinstance(item, Object)
            if item.children:
                continue
            del resident[item.digest]
            policy.evicted(item, [item.digest])
            if item.parent is not None:
                item.parent.children -= 1
                if not item.parent.children and not item.parent.stamp:
                    policy.restore(item.parent)
    aside = [item for item in resident.values() if not item.stamp]
    assert all(item.children for item in aside)
    assert sorted(map(id, policy.members())) == sorted(id(item) for item in resident.values() if item.stamp)
    return hits


def blocks_of(trace: Trace) -> int:
    return len({block for request in trace for block in request.blocks})


@pytest.mark.parametrize("name", SUITE)
def test_no_pattern_makes_it_worse_than_lru_by_more_than_a_hundredth(name: str) -> None:
    trace = SUITE[name](600, 3)
    for percent in (1, 5, 25):
        capacity = max(1, int(blocks_of(trace) * percent / 100))
        lru = hits_of(Lru(capacity), trace, capacity)
        assert hits_of(Density(capacity), trace, capacity) >= 0.99 * lru, f"{percent} %"


def test_a_short_trace_of_documents_asked_for_evenly_is_no_trap() -> None:
    trace = SUITE["documents, flat"](600, 3)
    capacity = blocks_of(trace) // 50
    assert hits_of(Density(capacity), trace, capacity) >= 0.99 * hits_of(Lru(capacity), trace, capacity)


@pytest.mark.parametrize(
    ("name", "requests", "seed", "percent"),
    [
        *((name, 2000, 3, 5) for name in ("alternating", "changes", "echo of documents", "reruns, twice", "stack")),
        # All at once they want back what they had long left alone.
        ("reruns", 2000, 7, 20),
        ("reruns", 3000, 7, 10),
        ("echo of documents", 1500, 3, 20),
        ("echo of documents", 3000, 3, 30),
    ],
)
def test_nor_does_it_once_it_believes_in_what_it_learnt(name: str, requests: int, seed: int, percent: int) -> None:
    trace = SUITE[name](requests, seed)
    capacity = percent * blocks_of(trace) // 100
    assert hits_of(Density(capacity), trace, capacity) >= 0.99 * hits_of(Lru(capacity), trace, capacity)


@pytest.mark.parametrize(("make", "gain"), [(documents, 1.2), (chats, 1.05)])
def test_it_beats_lru_where_reuse_can_be_foretold(make, gain: float) -> None:
    trace = make(4000, 1)
    capacity = blocks_of(trace) // 20
    lru = hits_of(Lru(capacity), trace, capacity)
    assert hits_of(Density(capacity), trace, capacity) > gain * lru
    assert hits_of(Density(capacity, sample=capacity // 2), trace, capacity) > gain * lru


def test_the_same_requests_are_evicted_alike_every_time() -> None:
    trace = join([documents(300, 1), shuffle(chats(300, 2), 20, 3)], apart=True)
    assert len({hits_of(Density(200), trace, 200) for _ in range(2)}) == 1


CHAINS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 8)), max_size=80)


@given(chains=CHAINS, capacity=st.integers(1, 20), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_stake_knows_what_lru_would_hold(chains, capacity: int, data: st.DataObject) -> None:
    forecast = Forecast(capacity, 4.0 * capacity, 4.0)
    history = forecast.history
    history._limit = 5  # so that used-up stretches are dropped all the time
    stake = Stake(history, capacity)
    held: OrderedDict[bytes, float] = OrderedDict()
    arena: set[bytes] = set()
    asked: dict[bytes, float] = {}
    now = 0.0
    for document, branch, length in chains:
        names = [b"%d.%d.%d" % (document, branch if i > 2 else 0, i) for i in range(length)]
        now += length
        hits = next((i for i, name in enumerate(names) if name not in arena), length)
        kinds = forecast.ask(names, now)
        before = next((i for i, name in enumerate(names) if name not in held), length)
        assert sum(part.held for part in kinds.held) == before
        stake.asked(names, hits, kinds.held, now)
        for name in reversed(names):
            held[name] = asked[name] = now
            held.move_to_end(name)
        while len(held) > capacity:
            held.popitem(last=False)
        assert {name for name in asked if history.holds(name)} == set(held)
        assert set(history.held_of(sorted(asked))) == set(held)
        assert history.since <= min(held.values())
        assert history.held == len(held)
        assert all((stretch := history.find(name)) is not None and name in stretch.names for name in held)
        known = set(history._by_name)
        assert {name for name, time in asked.items() if now - time <= 4 * capacity} <= known
        assert known <= {name for name, time in asked.items() if now - time <= 4 * capacity + 8 or name in held}
        assert sum(not stretch.names for stretch in history._stretches) <= history._limit
        arena.update(names)
        for name in data.draw(st.lists(st.sampled_from(sorted(arena)), max_size=3)):
            arena.discard(name)
            stake.left([name])
        assert stake._lent == set(held) - arena
        if names and data.draw(st.integers(0, 9)) == 0:  # a write that failed, say
            gone = names[data.draw(st.integers(0, length - 1)) :]
            stake.gone(gone)
            for name in gone:
                held.pop(name, None)
                asked.pop(name, None)
                arena.discard(name)


@given(chains=CHAINS, order=st.randoms(use_true_random=False), capacity=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_names_in_any_order_are_remembered_all_the_same(chains, order, capacity: int) -> None:
    """Those that an engine brings along may mean something each on their own."""
    forecast = Forecast(capacity, 4.0 * capacity, 4.0)
    now = 0.0
    for document, branch, length in chains:
        names = [b"%d.%d.%d" % (document, branch if i > 2 else 0, i) for i in range(length)]
        order.shuffle(names)
        now += length
        before = next((i for i, name in enumerate(names) if not forecast.history.holds(name)), length)
        kinds = forecast.ask(names, now)
        assert 0 <= kinds.known <= length
        assert sum(part.held for part in kinds.held) == before
        forecast.history.shrink(capacity)
        assert all((stretch := forecast.history.find(name)) is not None and stretch.time == now for name in names)
        assert forecast.history.held <= capacity


@given(chains=CHAINS, capacity=st.integers(2, 20))
@settings(max_examples=300, deadline=None)
def test_at_full_price_no_load_whatever_costs_more_than_the_share_of_lru_s_hits(chains, capacity: int) -> None:
    trace = named(chains)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(price_module, "LEAST", 1.0)
        patch.setattr(stake_module, "INCOME", 0.25)
        hits = hits_of(Density(capacity), trace, capacity)
    assert hits >= 0.75 * hits_of(Lru(capacity), trace, capacity)


def named(chains: list[tuple[int, int, int]]) -> Trace:
    """Requests for a document's first blocks, a few of which branch."""
    numbers: dict[tuple[int, int, int], int] = {}
    return [
        Request(
            t, 0, 0, [numbers.setdefault((document, branch if i > 2 else 0, i), len(numbers)) for i in range(length)]
        )
        for t, (document, branch, length) in enumerate(chains)
    ]


class Asked:
    """A stake, and what was asked for."""

    def __init__(self) -> None:
        self.forecast = Forecast(100, 1600.0, 4.0)
        self.stake = Stake(self.forecast.history, 100)
        self.names = [b"%d" % i for i in range(50)]
        self.now = 0.0

    def __call__(self, hits: int) -> None:
        self.now += 50
        kinds = self.forecast.ask(list(self.names), self.now)
        self.stake.asked(self.names, hits, kinds.held, self.now)


def test_nothing_is_lent_before_it_was_earned() -> None:
    asked = Asked()
    stake = asked.stake
    asked(0)
    for _ in range(3):
        asked(50)
        assert not stake.affords(0)
    for _ in range(10):
        asked(50)
    assert stake.affords(0)
    assert not stake.affords(5)
    for name in asked.names[40:]:
        stake.left([name])
    assert not stake.affords(0)
    asked(40)
    assert stake.account < 0


def test_a_miss_of_what_was_not_lent_is_no_loss() -> None:
    asked = Asked()
    asked(0)
    asked(0)  # it is still being written, say
    assert asked.stake.account == 0


def test_who_never_says_what_is_asked_for_has_lru() -> None:
    policy, lru = Density(50), Lru(50)
    for each in (policy, lru):
        items = [Tracked(b"%d" % i) for i in range(10)]
        each.add(items)
        each.touch(items[2:3])
        each.touch(items[:2])
        each.touch(items[2:3])
    assert [policy.pop().digest for _ in range(10)] == [lru.pop().digest for _ in range(10)]  # type: ignore[union-attr]


def test_of_a_sample_lru_holds_the_same_share_as_the_arena() -> None:
    trace = chats(2000, 1)
    capacity = blocks_of(trace) // 20
    policy = Density(capacity, sample=capacity // 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stake_module.Stake, "affords", lambda self, of_run: False)
        patch.setattr(stake_module, "INCOME", 0.0)
        hits = hits_of(policy, trace, capacity)
    assert hits == hits_of(Lru(capacity), trace, capacity)
    assert abs(policy.stake.account) < 0.002 * hits


@given(
    puts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), min_size=1, max_size=30),
    worth=st.lists(st.integers(0, 5), min_size=3 * BUCKETS, max_size=3 * BUCKETS),
    compact=st.booleans(),
    look=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_shelves_give_the_least_worth_first_whatever_its_age(puts, worth, compact: bool, look: bool) -> None:
    ages = Ages(4.0)
    shelves: Shelves[int] = Shelves(3, ages)
    now, runs = 0.0, []
    for number, (kind, pause) in enumerate(puts):
        now += pause
        shelves.now = now
        runs.append(Run(now, kind, [number], number))
        shelves.put(runs[-1])
        if compact:
            shelves.compact(lambda run, member: True)
        if look:
            shelves.coldest()
    shelves.arrange(worth)
    left = set(range(len(runs)))
    worths = [worth[run.kind * BUCKETS + ages.bucket(now - run.time)] for run in runs]
    for _ in runs:
        run = shelves.coldest()
        assert run is not None
        assert worths[run.number] == min(worths[i] for i in left)
        left.remove(run.members.pop())
    assert shelves.coldest() is None


def test_nothing_is_kept_beyond_its_bounds() -> None:
    policy = Density(50)
    run = [Tracked(b"%d" % i) for i in range(10)]
    policy.add(run)
    for _ in range(2_000):
        policy.asked([item.digest for item in run], 10)
        policy.touch(run)
    assert policy._entries <= policy._limit
    assert len(policy._log) <= policy._limit
    assert sum(1 for _ in policy._shelves) <= policy._limit
    assert len(policy.forecast.history._stretches) <= policy.forecast.history._limit
    assert len(policy._shelves._due) <= policy._limit
