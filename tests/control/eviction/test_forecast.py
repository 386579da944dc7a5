"""What was asked for lately, by stretches, and what is learnt of it: as if each name were looked at by itself."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.control.eviction import Density
from lmcache.control.eviction.forecast import KINDS, Forecast, rates
from lmcache.control.eviction.history import History, Stretch, used_again
from lmcache.control.eviction.shelves import BUCKETS

CHAINS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 8)), max_size=80)


ANY_ORDER = st.lists(
    st.lists(st.integers(0, 12).map(lambda i: b"%d" % i), min_size=1, max_size=8, unique=True), max_size=60
)


def listed(chains: list[tuple[int, int, int]]) -> list[list[bytes]]:
    """Names that commit to what is before them."""
    return [[b"%d.%d.%d" % (doc, branch if i > 2 else 0, i) for i in range(length)] for doc, branch, length in chains]


@given(requests=st.one_of(CHAINS.map(listed), ANY_ORDER), capacity=st.integers(1, 12), horizon=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_a_history_knows_each_name_once_and_what_lru_would_hold(requests, capacity: int, horizon: int) -> None:
    history = History(horizon)
    history._limit = 8  # so that it is compacted soon
    held: OrderedDict[bytes, int] = OrderedDict()
    uses: dict[bytes, int] = {}
    for now, names in enumerate(requests, 1):
        list(history.forget(now))
        assert all(now - s.time <= horizon or s.held for s in history._stretches if s.names)
        known = history._by_name.keys()
        leading = next((i for i, name in enumerate(names) if name not in known), len(names))
        assert history.held_of(names) == [name for name in names if name in held]
        parts = history.take(names)
        assert [name for part in parts for name in part.names] == names[:leading]
        for part in parts:
            assert [name in held for name in part.names] == [i < part.held for i in range(len(part.names))]
        uses.update({name: min(4, uses[name] + 1) for name in names[:leading]})
        uses.update(dict.fromkeys(names[leading:], 0))
        history.drop(names[leading:])
        history.put(Stretch(now, 0, 0, len(names), names[leading:], bytes(len(names) - leading)))
        history.put(Stretch(now, 0, 0, len(names), names[:leading], used_again(parts)))
        for name in reversed(names):
            held[name] = now
            held.move_to_end(name)
        gone = history.shrink(capacity)
        assert set(gone) == {held.popitem(last=False)[0] for _ in range(len(held) - capacity)}
        assert history.held == len(held)
        assert history.since == min(held.values())
        stretches = history._stretches
        assert {name: s for s in stretches for name in s.names} == history._by_name
        assert sum(len(s.names) for s in stretches) == len(history._by_name)
        assert {name for s in stretches for name in s.names[: s.held]} == set(held)
        assert all(history.holds(name) == (name in held) for name in history._by_name)
        assert all(uses[name] == used for s in stretches for name, used in zip(s.names, s.uses, strict=True))
        assert [s.time for s in stretches] == sorted(s.time for s in stretches)


@given(chains=CHAINS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_dropped_is_not_known_and_not_held(chains, data: st.DataObject) -> None:
    history = History(100)
    for now, names in enumerate(listed(chains), 1):
        parts = history.take(names)
        leading = sum(len(part.names) for part in parts)
        history.put(Stretch(now, 0, 0, len(names), names[leading:], bytes(len(names) - leading)))
        history.put(Stretch(now, 0, 0, len(names), names[:leading], used_again(parts)))
        gone = data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
        before = history.held
        history.drop(gone)
        assert history.held == before - len(gone)
        assert not any(history.find(name) or history.holds(name) for name in gone)


def counted(requests: list[list[bytes]], forecast: Forecast) -> tuple[list[list[float]], list[list[float]]]:
    """(used, reached), by bucket and class: what `Forecast` has counted, found name by name."""
    edges = forecast.ages.edges
    last: dict[bytes, tuple[float, int, int]] = {}  # name → when, class, bucket it has reached
    used = [[0.0] * KINDS for _ in range(BUCKETS)]
    reached = [[0.0] * KINDS for _ in range(BUCKETS)]
    now = 0.0
    for names in requests:
        now += len(names)
        for name, (time, kind, bucket) in last.items():
            while bucket + 1 < BUCKETS and now - time >= edges[bucket + 1]:
                bucket += 1
                reached[bucket][kind] += 1
            last[name] = time, kind, bucket
        kinds = forecast.ask(names, now)
        for i, name in enumerate(names):
            if i < kinds.known:
                _, kind, bucket = last[name]
                used[bucket][kind] += 1
            kind = kinds.again if i < kinds.known else kinds.new
            last[name] = now, kind, 0
            reached[0][kind] += 1
    return used, reached


@given(chains=CHAINS, every=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_a_forecast_counts_what_was_used_and_which_ages_were_reached(chains, every: int) -> None:
    forecast = Forecast(20, 1e9, 4.0)
    forecast._interval, forecast._keep = every, 1.0
    used, reached = counted(listed(chains), forecast)
    forecast._fit(sum(length for _, _, length in chains))
    assert forecast._used == used
    assert forecast._reached == reached


@given(st.lists(st.tuples(st.floats(0.001, 0.999), st.floats(0.1, 1e5)), min_size=1, max_size=BUCKETS))
@settings(max_examples=200, deadline=None)
def test_the_worth_of_an_age_is_the_best_of_all_times_to_wait(ages) -> None:
    found = rates([chance for chance, _ in ages], [width for _, width in ages])
    for first, worth in enumerate(found):
        hits = time = 0.0
        left = 1.0
        best = []
        for chance, width in ages[first:]:
            hits += left * chance
            time += left * width * (1 - chance / 2)
            left *= 1 - chance
            best.append(hits / time)
        assert worth == pytest.approx(max(best), rel=1e-9)


def test_names_that_repeat_in_a_request_count_once() -> None:
    policy = Density(100)
    policy.asked([b"a", b"b", b"a", b"c"], 0)
    assert policy.forecast.history.held == 3
    policy.asked([b"a", b"b", b"a", b"c"], 3)
    assert policy.forecast.history.held == 3
