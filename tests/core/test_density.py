"""The policy that keeps what promises most hits per time: never far below LRU, above it where reuse can be foretold."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.eviction import Density, Lru, Policy, Tracked
from lmcache.eviction import stake as stake_module
from lmcache.eviction.forecast import Forecast
from lmcache.eviction.shelves import BUCKETS, Ages, Run, Shelves
from lmcache.eviction.stake import Stake
from lmcache.simulate.traces import SUITE, Request, Trace, chats, documents, join, shuffle


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


@pytest.mark.parametrize("name", ["alternating", "changes", "echo of documents", "reruns, twice", "stack"])
def test_nor_does_it_once_it_believes_in_what_it_learnt(name: str) -> None:
    trace = SUITE[name](2000, 3)
    capacity = blocks_of(trace) // 20
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


@given(
    chains=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 8)), max_size=60),
    capacity=st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_a_forecast_keeps_its_books(chains, capacity: int) -> None:
    forecast = Forecast(capacity, 16 * capacity, 4.0)
    now = 0.0
    for document, branch, length in chains:
        keys = [(document, branch if i > 2 else 0, i) for i in range(length)]
        now += length
        kinds = forecast.ask(keys, now)
        assert 0 <= kinds.known <= length
        nodes = forecast._nodes
        assert all(node.run is not None and node in node.run.members for node in nodes.values())
        assert len(nodes) <= 17 * capacity + 16


CHAINS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 8)), max_size=80)


@given(chains=CHAINS, capacity=st.integers(1, 20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_stake_knows_what_lru_would_hold(chains, capacity: int, data: st.DataObject) -> None:
    stake = Stake(capacity)
    stake._limit = 30  # so that the log is compacted all the time
    held: OrderedDict[object, int] = OrderedDict()
    arena: set[object] = set()
    for now, (document, branch, length) in enumerate(chains, 1):
        names = [(document, branch if i > 2 else 0, i) for i in range(length)]
        hits = next((i for i, name in enumerate(names) if name not in arena), length)
        stake.asked(names, hits, now)
        for name in reversed(names):
            held[name] = now
            held.move_to_end(name)
        while len(held) > capacity:
            held.popitem(last=False)
        assert set(stake._held) == set(held)
        assert stake.since <= min(held.values())
        arena.update(names)
        for name in data.draw(st.lists(st.sampled_from(sorted(arena)), max_size=3)):
            arena.discard(name)
            stake.left([name])
        assert stake._lent == set(held) - arena
        assert sum(len(entry[2]) for entry in stake._log) <= 30 + length


@given(chains=CHAINS, capacity=st.integers(2, 20))
@settings(max_examples=300, deadline=None)
def test_at_full_price_no_load_whatever_costs_more_than_the_share_of_lru_s_hits(chains, capacity: int) -> None:
    trace = named(chains)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stake_module, "PRICE", 1.0)
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


def test_nothing_is_lent_before_it_was_earned() -> None:
    stake = Stake(100)
    names = list(range(50))
    stake.asked(names, 0, 1.0)
    for _ in range(3):
        stake.asked(names, 50, 1.0)
        assert not stake.affords(0)
    for _ in range(10):
        stake.asked(names, 50, 1.0)
    assert stake.affords(0)
    assert not stake.affords(5)
    for name in names[40:]:
        stake.left([name])
    assert not stake.affords(0)
    stake.asked(names, 40, 1.0)
    assert stake.account < 0


def test_a_miss_of_what_was_not_lent_is_no_loss() -> None:
    stake = Stake(100)
    stake.asked(range(50), 0, 1.0)
    stake.asked(range(50), 0, 2.0)  # it is still being written, say
    assert stake.account == 0


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
)
@settings(max_examples=200, deadline=None)
def test_shelves_give_the_least_worth_first_whatever_its_age(puts, worth, compact: bool) -> None:
    ages = Ages(4.0)
    shelves: Shelves[int] = Shelves(3, ages)
    now, runs = 0.0, []
    for number, (kind, pause) in enumerate(puts):
        now += pause
        list(shelves.advance(now))
        runs.append(Run(now, kind, [number]))
        shelves.put(runs[-1])
        if compact:
            shelves.compact(lambda run, member: True)
    shelves.arrange(worth)
    edges = ages.edges
    left = set(range(len(runs)))
    for _ in runs:
        run = shelves.coldest()
        assert run is not None
        age = now - run.time
        assert edges[run.bucket] <= age
        assert run.bucket == BUCKETS - 1 or age < edges[run.bucket + 1]
        values = [worth[runs[i].kind * BUCKETS + runs[i].bucket] for i in left]
        assert worth[run.kind * BUCKETS + run.bucket] == min(values)
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
    assert len(policy.forecast._runs) <= 16 * 50
