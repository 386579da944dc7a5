"""Synthetic traces: the properties that all of them have."""

from __future__ import annotations

import pytest
from synthetic_traces import SUITE, Trace, chats, documents, join, mix, sample, shuffle, stretch


def check(trace: Trace) -> None:
    parents: dict[int, int] = {}
    before = 0.0
    for request in trace:
        assert request.time >= before
        before = request.time
        assert request.blocks
        for parent, block in zip([-1, *request.blocks], request.blocks, strict=False):
            assert parents.setdefault(block, parent) == parent, "a block has one parent"


@pytest.mark.parametrize("name", SUITE)
def test_a_trace_is_a_forest_in_order_of_time_and_depends_on_its_seed_alone(name: str) -> None:
    trace = SUITE[name](300, 5)
    assert trace == SUITE[name](300, 5)
    check(trace)
    assert len(trace) >= 100


def test_traces_are_joined_mixed_sampled_shuffled_and_stretched() -> None:
    one, two = documents(200, 1), chats(200, 2)
    for trace in (join([one, two], apart=True), join([one, one], apart=False), mix([one, two])):
        check(trace)
    assert 0 < len(sample(one, 0.5, 1)) < len(one)
    moved = shuffle(one, 50, 1)
    check(moved)
    assert sorted(r.blocks for r in moved) == sorted(r.blocks for r in one)
    assert stretch(one, 2)[-1].time == 2 * one[-1].time
