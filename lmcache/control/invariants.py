"""Checks the invariants of the index by recomputing every count from scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Protocol

from lmcache.control.extents import EVICTING, LONGEST, READY, WRITING, Extent, ExtentPin, NamespaceTable, extents_of
from lmcache.control.jobs import TrackedJob
from lmcache.control.outcomes import Owner
from lmcache.control.slot_pool import SlotPool
from lmcache.control.state import State
from lmcache.plan import ArenaSlot, Copy, Name


class HasPins(Protocol):
    """A lease or a job."""

    pins: list[tuple[SlotPool, list[ExtentPin]]]


def check(state: State, leases: Mapping[Owner, HasPins]) -> None:
    """Raises `AssertionError` with the first broken invariant."""
    refs: Counter[Extent] = Counter()
    for holder in (*leases.values(), *state.jobs.live.values()):
        refs.update(_pinned(holder))
    for group, pool in enumerate(state.pools):
        check_pool(f"group {state.names[group]!r}", pool, refs)
    for owner in leases:
        assert owner not in state.failed, f"owner {owner!r} holds a lease after its load failed"
    for job in state.jobs.live.values():
        _check_job(state, job)


def _pinned(holder: HasPins) -> Iterator[Extent]:
    for _, pins in holder.pins:
        for pin in pins:
            extents = list(extents_of([pin]))
            held = sum(len(extent.digests) for extent in extents)
            assert held == pin[1], f"{pin[1]} objects were pinned, {held} are"
            for extent, rest in pairwise(extents):
                assert extent.generation + len(extent.digests) == rest.generation, (
                    "pinned parts of an extent are not consecutive"
                )
            yield from extents


def _check_job(state: State, job: TrackedJob) -> None:
    label = f"{job.kind} job {job.id}"
    assert job.final_ranks != state.jobs.everyone, f"{label} is final on every rank, but still live"
    held = {
        (extent.space.namespace, digest, slot, gen)
        for extent in _pinned(job)
        for digest, slot, gen, _ in extent.objects()
    }
    for i, op in enumerate(job.ops):
        for place in (op.src, op.dst) if isinstance(op, Copy) else ():
            if isinstance(place, ArenaSlot):
                used = (op.name.namespace, op.name.chain, place.index, place.generation)
                assert used in held, f"{label} op {i} uses slot {place.index} without a pin"
        if isinstance(op, Copy) and isinstance(op.dst, ArenaSlot):
            ready = _is_ready(state, op.name, op.dst)
            assert job.concluded or not ready, f"{label} op {i}: ready before every rank has acknowledged it"


def _is_ready(state: State, name: Name, slot: ArenaSlot) -> bool:
    found = state.pools[name.group].find(name.namespace, name.chain, name.depth)
    return found is not None and found.ready and found.generation == slot.generation


def check_pool(label: str, pool: SlotPool, refs: Counter[Extent]) -> None:
    """Raises `AssertionError` with the first broken invariant of an arena; `refs`: references to each of its extents."""
    slots: Counter[int] = Counter(pool.free)
    extents = [extent for space in pool.spaces.values() for extent in dict.fromkeys(space.held.values())]
    queued = Counter(map(id, pool.policy.members()))
    for extent in (*extents, *pool.leaving):
        where = f"{label} slot {extent.slots[0]}"
        slots.update(extent.slots)
        assert len(extent.digests) == len(extent.slots), (
            f"{where}: {len(extent.digests)} objects, {len(extent.slots)} slots"
        )
        assert 0 < len(extent.digests) <= LONGEST, f"{where}: an extent of {len(extent.digests)} objects"
        assert extent.digest == extent.digests[0], f"{where}: the policy has it under another digest"
        assert extent.refs or extent.rest is None, f"{where}: refers to what was split off though nothing pins it"
        assert extent.refs == refs[extent], f"{where}: {extent.refs} references counted, {refs[extent]} held"
    for slot, times in slots.items():
        assert times == 1, f"{label}: slot {slot} is in use {times} times"
        assert 0 <= slot < pool.slots, f"{label}: slot {slot} is outside of [0, {pool.slots})"
    used = sum(len(extent.slots) for extent in (*extents, *pool.leaving))
    assert used + pool.unused == pool.slots, f"{label}: {used} used + {pool.unused} unused ≠ {pool.slots} slots"
    writing = sum(len(extent.slots) for extent in extents if extent.state == WRITING)
    assert writing == pool.writing, f"{label}: {pool.writing} objects being written counted, {writing} are"
    for extent in pool.leaving:
        where = f"{label} slot {extent.slots[0]}"
        assert extent.state == EVICTING, f"{where}: leaving in state {extent.state}"
        assert extent.refs, f"{where}: left, and not freed though nothing pins it"
        assert not queued[id(extent)], f"{where}: left, but the policy still has it"
    for namespace, space in pool.spaces.items():
        assert space.namespace == namespace, f"{label}: a table has the key of another namespace"
        assert space.held, f"{label}: an empty table is kept"
        _check_space(label, space, queued)


def _check_space(label: str, space: NamespaceTable, queued: Counter[int]) -> None:
    extents = list(dict.fromkeys(space.held.values()))
    by_digest = {digest: extent for extent in extents for digest in extent.digests}
    assert by_digest == space.held, f"{label}: an object is mapped to an extent that does not have it"
    assert len(by_digest) == sum(len(extent.digests) for extent in extents), f"{label}: an object is in two extents"
    children = Counter(extent.parent for extent in extents if extent.parent is not None)
    for extent in extents:
        where = f"{label} slot {extent.slots[0]}"
        assert extent.space is space, f"{where}: belongs to another namespace"
        assert extent.state in (WRITING, READY), f"{where}: a lookup finds it in state {extent.state}"
        assert extent.state == READY or extent.refs, f"{where}: in state WRITING without a job"
        inner = [digest for digest in extent.digests[:-1] if digest in children]
        assert not inner, f"{where}: an object that is not the last of its extent has a child extent"
        expected = children.pop(extent.digests[-1], 0)
        assert extent.children == expected, f"{where}: {extent.children} children counted, {expected} resident"
        assert queued[id(extent)] == (1 if extent.stamp else 0), f"{where}: queued {queued[id(extent)]} times"
        idle = extent.state == READY and not extent.refs and not extent.children
        assert extent.stamp or not idle, f"{where}: evictable, but the policy does not have it"
    assert space.orphans == children, f"{label}: orphans {space.orphans} counted, {dict(children)} resident"
