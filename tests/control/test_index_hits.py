"""Hit rules and their fixpoint, compared with brute force over tokens."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.control.lookup import fixpoint, longest, needed
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.labs.indexlab import CHUNK
from lmcache_conformance.suites.index_model import needs

STATE, WHOLE = HitRule("state_at"), HitRule("whole")
RULES = st.one_of(st.sampled_from([ALL, STATE, WHOLE]), st.integers(1, 20).map(trailing))


def legal(rule: HitRule, present: list[bool], n: int) -> bool:
    """Whether every chunk that a hit of n chunks needs, token by token, is present."""
    return all(present[i] for i in needs(rule, n))


@pytest.mark.parametrize(
    ("rule", "chunks", "expected"),
    [
        (ALL, 3, [0, 1, 2]),
        (trailing(1), 3, [2]),
        (trailing(4), 3, [2]),
        (trailing(5), 3, [1, 2]),
        (trailing(100), 3, [0, 1, 2]),
        (STATE, 3, [2]),
        (WHOLE, 3, [0]),
        *[(rule, 0, []) for rule in (ALL, trailing(5), STATE, WHOLE)],
    ],
)
def test_a_hit_needs_exactly_the_chunks_its_rule_names(rule: HitRule, chunks: int, expected: list[int]) -> None:
    assert list(needed(rule, chunks, CHUNK)) == expected


@settings(max_examples=300, deadline=None)
@given(RULES, st.lists(st.booleans(), max_size=12), st.data())
def test_longest_is_the_largest_legal_boundary(rule: HitRule, present: list[bool], data: st.DataObject) -> None:
    limit = data.draw(st.integers(0, len(present)))
    expected = max(n for n in range(limit + 1) if legal(rule, present, n))
    assert longest(rule, limit, CHUNK, present.__getitem__) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(RULES, st.lists(st.booleans(), min_size=10, max_size=10)), min_size=1, max_size=4),
    st.integers(0, 10),
)
def test_the_fixpoint_is_the_largest_boundary_legal_for_every_group(groups, limit: int) -> None:
    expected = max(n for n in range(limit + 1) if all(legal(rule, present, n) for rule, present in groups))
    chunks, limiter = fixpoint(
        [partial(longest, rule, chunk_tokens=CHUNK, present=present.__getitem__) for rule, present in groups], limit
    )
    assert chunks == expected
    assert (limiter == -1) == (chunks == limit)
    if limiter >= 0:
        rule, present = groups[limiter]
        assert not legal(rule, present, chunks + 1) or chunks + 1 > limit or len(groups) > 1


def test_a_window_is_checked_from_its_end_so_that_long_chains_take_one_pass() -> None:
    checked: list[int] = []

    def present(i: int) -> bool:
        checked.append(i)
        return i < 500

    assert longest(trailing(40), 1000, CHUNK, present) == 500
    assert len(checked) <= 1000
