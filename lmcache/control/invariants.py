"""The invariants of the index, recomputed from scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Protocol

from lmcache.control.extents import EVICTING, LONGEST, READY, WRITING, Run, Space, Span, pieces
from lmcache.control.jobs import Work
from lmcache.control.outcomes import Owner
from lmcache.control.slot_pool import Pool
from lmcache.control.state import State
from lmcache.plan import Copy, Name, Slot


class HasPins(Protocol):
    """A lease."""

    pins: list[tuple[Pool, list[Span]]]


def check(state: State, leases: Mapping[Owner, HasPins]) -> None:
    """Raise `AssertionError` naming the first broken invariant."""
    refs: Counter[Run] = Counter()
    for holder in (*leases.values(), *state.jobs.live.values()):
        refs.update(_held(holder))
    for group, pool in enumerate(state.pools):
        check_pool(f"group {state.names[group]!r}", pool, refs)
    for owner in leases:
        assert owner not in state.failed, f"owner {owner!r} holds a lease after its load failed"
    for work in state.jobs.live.values():
        _check_job(state, work)


def _held(holder: HasPins) -> Iterator[Run]:
    for _, spans in holder.pins:
        for span in spans:
            runs = list(pieces([span]))
            held = sum(len(run.digests) for run in runs)
            assert held == span[1], f"{span[1]} objects were taken hold of, {held} are held"
            for run, rest in pairwise(runs):
                assert run.generation + len(run.digests) == rest.generation, "held parts of a run do not join"
            yield from runs


def _check_job(state: State, work: Work) -> None:
    label = f"{work.kind} job {work.id}"
    assert work.final != state.jobs.everyone, f"{label} is final on every rank, but still there"
    held = {(run.space.namespace, digest, slot, gen) for run in _held(work) for digest, slot, gen, _ in run.objects()}
    for i, op in enumerate(work.ops):
        for place in (op.src, op.dst) if isinstance(op, Copy) else ():
            if isinstance(place, Slot):
                there = (op.name.namespace, op.name.chain, place.index, place.generation)
                assert there in held, f"{label} op {i} uses slot {place.index} without a reference"
        if isinstance(op, Copy) and isinstance(op.dst, Slot):
            ready = _is_ready(state, op.name, op.dst)
            assert work.told or not ready, f"{label} op {i}: ready before every rank has acknowledged it"


def _is_ready(state: State, name: Name, slot: Slot) -> bool:
    found = state.pools[name.group].find(name.namespace, name.chain, name.depth)
    return found is not None and found.ready and found.generation == slot.generation


def check_pool(label: str, pool: Pool, refs: Counter[Run]) -> None:
    """The same for one arena, of whose runs `refs` counts who holds them."""
    slots: Counter[int] = Counter(pool.free)
    runs = [run for space in pool.spaces.values() for run in dict.fromkeys(space.held.values())]
    queued = Counter(map(id, pool.policy.members()))
    for run in (*runs, *pool.leaving):
        where = f"{label} slot {run.slots[0]}"
        slots.update(run.slots)
        assert len(run.digests) == len(run.slots), f"{where}: {len(run.digests)} objects, {len(run.slots)} slots"
        assert 0 < len(run.digests) <= LONGEST, f"{where}: a run of {len(run.digests)} objects"
        assert run.digest == run.digests[0], f"{where}: shown to the policy under another name"
        assert run.refs or run.rest is None, f"{where}: remembers what was split off though nothing holds it"
        assert run.refs == refs[run], f"{where}: {run.refs} references counted, {refs[run]} held"
    for slot, times in slots.items():
        assert times == 1, f"{label}: slot {slot} is in use {times} times"
        assert 0 <= slot < pool.slots, f"{label}: slot {slot} is outside of [0, {pool.slots})"
    used = sum(len(run.slots) for run in (*runs, *pool.leaving))
    assert used + pool.unused == pool.slots, f"{label}: {used} used + {pool.unused} unused ≠ {pool.slots} slots"
    writing = sum(len(run.slots) for run in runs if run.state == WRITING)
    assert writing == pool.writing, f"{label}: {pool.writing} objects being written counted, {writing} are"
    for run in pool.leaving:
        where = f"{label} slot {run.slots[0]}"
        assert run.state == EVICTING, f"{where}: leaving in state {run.state}"
        assert run.refs, f"{where}: left, and not freed though nothing holds it"
        assert not queued[id(run)], f"{where}: left, but the policy still has it"
    for namespace, space in pool.spaces.items():
        assert space.namespace == namespace, f"{label}: a space is filed under another namespace"
        assert space.held, f"{label}: an empty space is kept"
        _check_space(label, space, queued)


def _check_space(label: str, space: Space, queued: Counter[int]) -> None:
    runs = list(dict.fromkeys(space.held.values()))
    filed = {digest: run for run in runs for digest in run.digests}
    assert filed == space.held, f"{label}: an object is filed under a run that does not have it"
    assert len(filed) == sum(len(run.digests) for run in runs), f"{label}: an object is there twice"
    children = Counter(run.parent for run in runs if run.parent is not None)
    for run in runs:
        where = f"{label} slot {run.slots[0]}"
        assert run.space is space, f"{where}: belongs to another namespace"
        assert run.state in (WRITING, READY), f"{where}: can be found in state {run.state}"
        assert run.state == READY or run.refs, f"{where}: being written by nobody"
        inner = [digest for digest in run.digests[:-1] if digest in children]
        assert not inner, f"{where}: something hangs off an object that is not the last of its run"
        expected = children.pop(run.digests[-1], 0)
        assert run.children == expected, f"{where}: {run.children} children counted, {expected} resident"
        assert queued[id(run)] == (1 if run.stamp else 0), f"{where}: queued {queued[id(run)]} times"
        idle = run.state == READY and not run.refs and not run.children
        assert run.stamp or not idle, f"{where}: could be evicted, but the policy does not have it"
    assert space.orphans == children, f"{label}: orphans {space.orphans} counted, {dict(children)} resident"
