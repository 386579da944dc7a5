"""What a report means: objects become ready, leave, or are known to be in a tier; jobs conclude and let go.

A rank's statuses count once, the first time they come. A failure acts at once; success waits for all ranks. What a job
holds on to is freed only when every rank called it final, that is, when no hung call can touch the memory any more.
"""

from __future__ import annotations

from functools import partial

from lmcache.control.jobs import TrackedJob
from lmcache.control.lookup import fixpoint, longest
from lmcache.control.outcomes import Finished, StopReason
from lmcache.control.state import State
from lmcache.plan import ArenaSlot, Copy, Delete, Engine, JobReport, Name, Probe, Report, Status, Tier

_GONE = (Status.MISSING, Status.CORRUPT, Status.FAILED)
"""After these the object counts as no longer in the tier it was read from."""

_REASONS = {Status.MISSING: StopReason.EVICTED, Status.CORRUPT: StopReason.CORRUPT}


def apply(state: State, report: Report) -> list[Finished]:
    """Apply a report of one rank; returns the jobs it ended."""
    finished: list[Finished] = []
    for work, job in state.jobs.news(report):
        if job.final:
            work.final |= 1 << report.rank
        if not work.reported >> report.rank & 1:
            _statuses(state, work, job, report.rank)
        _advance(state, work, finished)
    return finished


def overdue(state: State, work: TrackedJob) -> list[Finished]:
    """Ranks that have said nothing by now count as late; what they still send matters only for its finality."""
    for rank in range(state.jobs.ranks):
        if not work.reported >> rank & 1:
            _statuses(state, work, JobReport(work.id, (int(Status.LATE),) * len(work.ops), False), rank)
    finished: list[Finished] = []
    _advance(state, work, finished)
    return finished


def release(work: TrackedJob) -> None:
    """Let go of everything the job held."""
    for pool, spans in work.pins:
        pool.unpin(spans)
    work.pins = []


def _statuses(state: State, work: TrackedJob, job: JobReport, rank: int) -> None:
    work.reported |= 1 << rank
    statuses = job.statuses if len(job.statuses) == len(work.ops) else (int(Status.FAILED),) * len(work.ops)
    for i, code in enumerate(statuses):
        status = Status(code)
        if status is Status.PENDING:
            status = Status.LATE
        if status is not Status.OK and work.results[i] is Status.OK:
            work.results[i] = status
        _observe(state, work, i, status, rank)


def _observe(state: State, work: TrackedJob, i: int, status: Status, rank: int) -> None:
    """One op on one rank: what it says about the places involved."""
    op = work.ops[i]
    if isinstance(op, Probe):
        if not work.cleared and status is Status.OK:
            state.directories[op.tier].add(op.name, rank)
        elif status is Status.MISSING:
            state.directories[op.tier].remove(op.name, rank)
        return
    if not isinstance(op, Copy):
        return
    if status is Status.OK:
        if isinstance(op.dst, Tier) and not work.cleared:
            state.directories[op.dst.index].add(op.name, rank)
        return
    reason = _REASONS.get(status, StopReason.FAILED)
    if isinstance(op.dst, ArenaSlot):
        _drop(state, op.name, op.dst, reason)
        state.counts["dropped"] += 1
    if isinstance(op.src, Tier) and status in _GONE:
        known = state.directories[op.src.index]
        if known.remove(op.name, None if status is Status.CORRUPT else rank):
            state.pools[op.name.group].gone.put(op.name.chain, reason)
            if status is Status.CORRUPT:
                state.counts["corrupt"] += 1
                state.delete(op.src.index, [op.name])
    elif isinstance(op.src, ArenaSlot) and isinstance(op.dst, Engine) and (status in _GONE or status is Status.SKIPPED):
        # A rank whose slot does not hold the object (any more) says SKIPPED.
        _drop(state, op.name, op.src, reason)


def _drop(state: State, name: Name, slot: ArenaSlot, reason: StopReason) -> None:
    state.pools[name.group].drop(name.namespace, name.chain, name.depth, slot.generation, reason)


def _advance(state: State, work: TrackedJob, finished: list[Finished]) -> None:
    everyone = state.jobs.everyone
    final = work.final == everyone
    if work.reported == everyone and not work.told:
        work.told = True
        _conclude(state, work)
        if work.kind == "load":
            work.told_final = final
            finished.append(_finished(work, final))
    if final and work.told:
        release(work)
        del state.jobs.live[work.id]
        for op in work.ops:
            if isinstance(op, Delete):
                state.deleted(op.tier, op.name)
        if work.kind == "write_back" and work.cleared:
            for tier, name in written(work):  # it came back after the clear: away with it
                state.delete(tier, [name])
        if not work.told_final:
            finished.append(_finished(work, True))


def _conclude(state: State, work: TrackedJob) -> None:
    """Every rank has spoken."""
    below = len(state.tiers)
    for op, status in zip(work.ops, work.results, strict=True):
        # What came from a tier is promoted to the nearer ones only.
        if status is Status.OK and isinstance(op, Copy) and isinstance(op.dst, ArenaSlot) and isinstance(op.src, Tier):
            below = min(below, op.src.index)
    for group, spans in work.inserted.items():  # what failed has left
        state.write_back(work.namespace, group, state.pools[group].publish(spans), range(below))
    if work.wanted is not None:
        work.ok_tokens = _loaded(state, work)
        failed = any(status is not Status.OK for status in work.results)
        state.counts["failed_loads"] += failed
        state.load_ended(work.owner, work.id, failed)
    else:
        chunks = {op.name.chain for i, op in enumerate(work.ops) if work.results[i] is Status.OK}
        work.ok_tokens = len(chunks) * state.chunk_tokens


def _loaded(state: State, work: TrackedJob) -> int:
    """Largest boundary up to which every group has what its rule needs, of what was loaded and what the engine had."""
    wanted = work.wanted
    assert wanted is not None
    chunk = state.chunk_tokens
    if all(status is Status.OK for status in work.results):
        return max(wanted.skip, wanted.chunks * chunk)
    own = wanted.skip // chunk
    arrived: list[set[int]] = [set() for _ in state.rules]
    for op, group, position in wanted.targets:
        if work.results[op] is Status.OK:
            arrived[group].add(position)

    def shorten(group: int, chunks: int) -> int:
        return longest(state.rules[group], chunks, chunk, lambda i: i < own or i in arrived[group])

    groups = [partial(shorten, group) for group in range(len(state.rules))]
    chunks, _ = fixpoint(groups, wanted.chunks)
    return max(wanted.skip, chunks * chunk)


def written(work: TrackedJob) -> list[tuple[int, Name]]:
    """Tier and name of what a spill may have written."""
    copies = [op for op in work.ops if isinstance(op, Copy)]
    return [(op.dst.index, op.name) for op in copies if isinstance(op.dst, Tier)]


def _finished(work: TrackedJob, final: bool) -> Finished:
    return Finished(work.id, work.kind, work.owner, work.ok_tokens, tuple(work.results), final)
