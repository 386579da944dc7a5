"""The invariants of the index, recomputed from scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from lmcache.index.messages import Owner
from lmcache.index.pool import EVICTING, READY, WRITING, Entry, Pool
from lmcache.index.state import State

Pins = Iterable[tuple[Pool, list[Entry]]]


class HasPins(Protocol):
    """A lease."""

    pins: list[tuple[Pool, list[Entry]]]


def check(state: State, leases: Mapping[Owner, HasPins]) -> None:
    """Raise `AssertionError` naming the first broken invariant."""
    refs: Counter[Entry] = Counter()
    for holder in (*leases.values(), *state.jobs.live.values()):
        for _, entries in holder.pins:
            refs.update(entries)
    for group, pool in enumerate(state.pools):
        _check_pool(f"group {state.names[group]!r}", pool, refs)
    for owner in leases:
        assert owner not in state.failed, f"owner {owner!r} holds a lease after its load failed"
    for work in state.jobs.live.values():
        label = f"{work.kind} job {work.id}"
        assert work.final != state.jobs.everyone, f"{label} is final on every rank, but still there"
        held = {entry for _, entries in work.pins for entry in entries}
        for i, (_, entry) in {**work.reads, **work.writes}.items():
            assert entry in held, f"{label} op {i} uses slot {entry.slot} without a reference"
        for i, (_, entry) in work.writes.items():
            assert work.told or entry.state != READY, f"{label} op {i}: ready before every rank has acknowledged it"


def _check_pool(label: str, pool: Pool, refs: Counter[Entry]) -> None:
    slots: Counter[int] = Counter(pool.free)
    children: Counter[tuple[bytes, bytes]] = Counter()
    residents = list(pool.residents())
    queued = Counter(map(id, pool.policy.members()))
    for entry in (*residents, *pool.leaving):
        where = f"{label} slot {entry.slot}"
        slots[entry.slot] += 1
        assert entry.refs == refs[entry], f"{where}: {entry.refs} references counted, {refs[entry]} held"
        if entry.parent is not None and entry.state != EVICTING:
            children[entry.space.namespace, entry.parent] += 1
    for slot, count in slots.items():
        assert count == 1, f"{label}: slot {slot} is in use {count} times"
        assert 0 <= slot < pool.slots, f"{label}: slot {slot} is outside of [0, {pool.slots})"
    used = len(residents) + len(pool.leaving)
    assert used + pool.unused == pool.slots, f"{label}: {used} used + {pool.unused} unused ≠ {pool.slots} slots"
    for entry in pool.leaving:
        assert entry.state == EVICTING, f"{label} slot {entry.slot}: leaving in state {entry.state}"
        assert entry.refs, f"{label} slot {entry.slot}: left, and not freed though nothing holds it"
        assert not queued[id(entry)], f"{label} slot {entry.slot}: left, but the policy still has it"
    for namespace, space in pool.spaces.items():
        assert space.namespace == namespace, f"{label}: a space is filed under another namespace"
        assert space.ready or space.writing, f"{label}: an empty space is kept"
        assert not space.ready.keys() & space.writing.keys(), f"{label}: an object is ready and being written"
        for state, held in ((READY, space.ready), (WRITING, space.writing)):
            for digest, entry in held.items():
                where = f"{label} slot {entry.slot}"
                assert entry.digest == digest, f"{where}: filed under another name"
                assert entry.state == state, f"{where}: in state {entry.state}, filed under {state}"
                assert entry.space is space, f"{where}: belongs to another namespace"
                assert state == READY or entry.refs, f"{where}: being written by nobody"
                expected = children.pop((namespace, digest), 0)
                assert entry.children == expected, f"{where}: {entry.children} children counted, {expected} resident"
                assert queued[id(entry)] == (1 if entry.stamp else 0), f"{where}: queued {queued[id(entry)]} times"
                idle = state == READY and not entry.refs and not entry.children
                assert entry.stamp or not idle, f"{where}: could be evicted, but the policy does not have it"
        orphans = {parent: n for (ns, parent), n in children.items() if ns == namespace}
        assert space.orphans == orphans, f"{label}: orphans {space.orphans} counted, {orphans} resident"
