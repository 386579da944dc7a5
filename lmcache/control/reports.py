"""Applies reports: objects become ready, leave, or enter a tier directory; jobs conclude and release their pins.

Only the first report of a rank on a job counts for its statuses. A failure takes effect at once, success when all ranks have
reported. The pins of a job are released when it is final on every rank: when no call, however slow, can touch the memory any
more.
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

_UNLOADABLE = (*_GONE, Status.SKIPPED)
"""After these the object counts as no longer in the slot that it was to be loaded from. SKIPPED: the slot holds another one."""

_UNWRITABLE = (Status.CORRUPT,)
"""After these the object counts as no longer in the slot that it was to be written from."""

_FINE = (Status.OK, Status.PRESENT)

_REASONS = {Status.MISSING: StopReason.EVICTED, Status.CORRUPT: StopReason.CORRUPT}


def apply(state: State, report: Report) -> list[Finished]:
    """Applies a report of one rank; returns the jobs that it ended."""
    finished: list[Finished] = []
    for job, update in state.jobs.updates(report):
        if update.final:
            job.final_ranks |= 1 << report.rank
        if not job.reported_ranks >> report.rank & 1:
            _apply_statuses(state, job, update, report.rank)
        _advance(state, job, finished)
    return finished


def overdue(state: State, job: TrackedJob) -> list[Finished]:
    """Counts ranks that have not reported as late; of what they report afterwards, only `final` matters."""
    for rank in range(state.jobs.ranks):
        if not job.reported_ranks >> rank & 1:
            _apply_statuses(state, job, JobReport(job.id, (int(Status.LATE),) * len(job.ops), False), rank)
    finished: list[Finished] = []
    _advance(state, job, finished)
    return finished


def release(job: TrackedJob) -> None:
    """Releases the pins of the job."""
    for pool, pins in job.pins:
        pool.unpin(pins)
    job.pins = []


def _apply_statuses(state: State, job: TrackedJob, update: JobReport, rank: int) -> None:
    job.reported_ranks |= 1 << rank
    statuses = update.statuses if len(update.statuses) == len(job.ops) else (int(Status.FAILED),) * len(job.ops)
    for i, code in enumerate(statuses):
        status = Status(code)
        if status is Status.PENDING:
            status = Status.LATE
        if job.results[i] in _FINE and status is not Status.OK:
            job.results[i] = status
        _apply_status(state, job, i, status, rank)


def _apply_status(state: State, job: TrackedJob, i: int, status: Status, rank: int) -> None:
    """Updates the places of op `i` after its status on one rank."""
    op = job.ops[i]
    if isinstance(op, Probe):
        if not job.cleared and status is Status.OK:
            state.directories[op.tier].add(op.name, rank)
        elif status is Status.MISSING:
            state.directories[op.tier].remove(op.name, rank)
        return
    if not isinstance(op, Copy):
        return
    if status in _FINE:
        if isinstance(op.dst, Tier) and not job.cleared:
            state.directories[op.dst.index].add(op.name, rank)
        return
    if isinstance(op.dst, Tier) and status is Status.FULL:  # it was looked for, and is not there
        state.directories[op.dst.index].remove(op.name, rank)
    reason = _REASONS.get(status, StopReason.FAILED)
    if isinstance(op.dst, ArenaSlot):
        _drop(state, op.name, op.dst, reason)
        state.counts["dropped"] += 1
    if isinstance(op.src, Tier) and status in _GONE:
        directory = state.directories[op.src.index]
        if directory.remove(op.name, None if status is Status.CORRUPT else rank):
            state.pools[op.name.group].gone.put(op.name.chain, reason)
            if status is Status.CORRUPT:
                state.counts["corrupt"] += 1
                state.delete(op.src.index, [op.name])
    elif isinstance(op.src, ArenaSlot) and status in (_UNLOADABLE if isinstance(op.dst, Engine) else _UNWRITABLE):
        _drop(state, op.name, op.src, reason)


def _drop(state: State, name: Name, slot: ArenaSlot, reason: StopReason) -> None:
    state.pools[name.group].drop(name.namespace, name.chain, name.depth, slot.generation, reason)


def _advance(state: State, job: TrackedJob, finished: list[Finished]) -> None:
    everyone = state.jobs.everyone
    final = job.final_ranks == everyone
    if job.reported_ranks == everyone and not job.concluded:
        job.concluded = True
        _conclude(state, job)
        if job.kind == "load":
            job.returned_final = final
            finished.append(_finished(job, final))
    if final and job.concluded:
        release(job)
        del state.jobs.live[job.id]
        for op in job.ops:
            if isinstance(op, Delete):
                state.deleted(op.tier, op.name)
        if job.kind == "write_back" and job.cleared:
            for tier, name in written(job):  # written after the clear: delete it again
                state.delete(tier, [name])
        if not job.returned_final:
            finished.append(_finished(job, True))


def _conclude(state: State, job: TrackedJob) -> None:
    """Publishes what the job stored, and computes its result; called when every rank has reported."""
    below = len(state.tiers)
    for op, status in zip(job.ops, job.results, strict=True):
        # What was promoted from a tier is written only to the tiers nearer than that one.
        if status is Status.OK and isinstance(op, Copy) and isinstance(op.dst, ArenaSlot) and isinstance(op.src, Tier):
            below = min(below, op.src.index)
    for group, pins in job.inserted.items():  # objects that failed have been dropped
        state.write_back(job.namespace, group, state.pools[group].publish(pins), range(below))
    if job.kind == "write_back":
        _keep_receipts(state, job)
    if job.target is not None:
        job.ok_tokens = _loaded(state, job)
        failed = any(status is not Status.OK for status in job.results)
        state.counts["failed_loads"] += failed
        state.load_ended(job.owner, job.id, failed)
    else:
        chunks = {op.name.chain for i, op in enumerate(job.ops) if job.results[i] is Status.OK}
        job.ok_tokens = len(chunks) * state.chunk_tokens


def _keep_receipts(state: State, job: TrackedJob) -> None:
    """Counts what a write-back wrote and what was there already, and remembers what did not reach its tier."""
    for (tier, name), status in zip(written(job), job.results, strict=True):
        if status in _FINE:
            state.unwritten.pop((tier, name), None)
            state.counts["written" if status is Status.OK else "present"] += 1
        elif not job.cleared:
            state.not_written(tier, name, status.name.lower())


def _loaded(state: State, job: TrackedJob) -> int:
    """Tokens up to the largest boundary for which every group has what its rule needs, loaded or skipped."""
    target = job.target
    assert target is not None
    chunk = state.chunk_tokens
    if all(status is Status.OK for status in job.results):
        return max(target.skip, target.chunks * chunk)
    skipped = target.skip // chunk
    loaded: list[set[int]] = [set() for _ in state.rules]
    for op, group, position in target.targets:
        if job.results[op] is Status.OK:
            loaded[group].add(position)

    def shorten(group: int, chunks: int) -> int:
        return longest(state.rules[group], chunks, chunk, lambda i: i < skipped or i in loaded[group])

    groups = [partial(shorten, group) for group in range(len(state.rules))]
    chunks, _ = fixpoint(groups, target.chunks)
    return max(target.skip, chunks * chunk)


def written(job: TrackedJob) -> list[tuple[int, Name]]:
    """Tier and name of what a write-back may have written."""
    copies = [op for op in job.ops if isinstance(op, Copy)]
    return [(op.dst.index, op.name) for op in copies if isinstance(op.dst, Tier)]


def _finished(job: TrackedJob, final: bool) -> Finished:
    return Finished(job.id, job.kind, job.owner, job.ok_tokens, tuple(job.results), final)
