"""The control plane: decides what exists where, who holds what, which slot is used next. Plain, deterministic Python.

Single-threaded; no KV bytes, no I/O, no clock: time comes in as `now`, in seconds, never going back. It emits plans and
consumes reports (`lmcache.plan`), and is right whatever reports are lost, doubled, late or reordered.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from lmcache.control import invariants, planner, reports
from lmcache.control.eviction import PolicyFactory, hears, policy_factory
from lmcache.control.extents import ExtentPin
from lmcache.control.jobs import TrackedJob
from lmcache.control.lookup import Found, by_tier, find, stop_of
from lmcache.control.outcomes import Finished, Lookup, Owner, StopReason, Store, TierInfo
from lmcache.control.slot_pool import SlotPool
from lmcache.control.state import Admit, State
from lmcache.errors import ConfigError
from lmcache.plan import Chain, Delete, Name, Plan, Probe, Report, Status
from lmcache.spec import HitRule

_GRACE = 1.0
"""Seconds past a load's deadline after which a rank that has said nothing counts as late."""

_REMEMBERED_OWNERS = 16_384
"""Owners that are never forgotten by their engine cost no more than this many entries."""


Pins = list[tuple[SlotPool, list[ExtentPin]]]
_Query = tuple[int, int, int | None]

Notice = Callable[[bool, str, bytes, int, bytes], None]
"""(usable from now on, place: "dram" or a tier's name, namespace, group, digest)"""


class Lease:
    """A hit that was offered to an owner and is kept from eviction until it is loaded, released or expired.

    Attributes:
        chain, found: the hit. `found` is valid while the index has `version`.
        query: `limit`, `max_tokens` and `near` of the lookup that found it; `answer`: what that lookup returned.
        pins: of the hit in DRAM, one entry for each group; then of what was promoted for it since.
        expires, queued_until: seconds.
    """

    __slots__ = ("answer", "chain", "expires", "found", "pins", "query", "queued_until", "version")

    def __init__(self, chain: Chain, expires: float) -> None:
        self.chain = chain
        self.expires = self.queued_until = expires

    def offer(self, found: Found, query: _Query, answer: Lookup, pins: Pins, version: int) -> None:
        """What the lease is for."""
        self.found = found
        self.query = query
        self.answer = answer
        self.pins = pins
        self.version = version


class _Question(NamedTuple):
    """A probe of shared tiers on behalf of an owner, about one chain."""

    about: tuple[bytes, bytes, int]
    job: int
    until: float


class Index:
    """What exists where, on all `ranks` of one engine.

    Args:
        groups: name and hit rule of each layer group.
        chunk_tokens: tokens per chunk.
        slots: arena slots of each group, the same on every rank; 0 = this group is never kept in DRAM.
        ranks: how many ranks execute the plans; an object exists only if all of them have their part.
        tiers: the tiers below DRAM, nearest first.
        policy: eviction policy by name (`lmcache.control.eviction.POLICIES`) or a factory of one per arena.
        lease_ttl: seconds after which a lease that was neither loaded nor released expires.
        load_deadline: seconds a load may take before it counts as failed.
        probe_deadline: seconds a shared tier may take to say whether it holds an object.
        patience: seconds more that a lookup waits for that answer to arrive, for engines whose plans and reports travel with
            steps that may take long.
        admit: decides whether an object that became ready is written to a tier; all of them by default. See
            `lmcache.control.admission.rules`.

    Raises:
        ConfigError: unknown policy, or impossible numbers.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, HitRule]],
        chunk_tokens: int,
        slots: Sequence[int],
        *,
        ranks: int = 1,
        tiers: Sequence[TierInfo] = (),
        policy: str | PolicyFactory = "lru",
        lease_ttl: float = 60.0,
        load_deadline: float = 30.0,
        probe_deadline: float = 0.05,
        patience: float = 0.0,
        admit: Admit | None = None,
    ) -> None:
        if not groups or len(groups) != len(slots):
            raise ConfigError(f"{len(groups)} groups need as many slot counts, at least one, got {list(slots)}")
        if chunk_tokens < 1 or ranks < 1 or min(slots) < 0:
            raise ConfigError(f"impossible: chunk_tokens={chunk_tokens}, ranks={ranks}, slots={list(slots)}")
        factory = policy_factory(policy) if isinstance(policy, str) else policy
        self.state = State(groups, chunk_tokens, slots, ranks, tiers, factory, admit)
        self.leases: dict[Owner, Lease] = {}
        self._expiring: deque[tuple[Owner, Lease]] = deque()  # by expiry when queued
        self._overdue: deque[tuple[float, int]] = deque()
        self._questions: OrderedDict[Owner, _Question] = OrderedDict()
        # Where only a window or the last state is kept, what was asked for is not what is stored: nothing to learn from.
        self._curious = [
            g for g, pool in enumerate(self.state.pools) if hears(pool.policy) and self.state.rules[g].kind == "all"
        ]
        self.learner = getattr(admit, "asked", None)  # see `lmcache.control.admission.rules.Learns`
        self._told: OrderedDict[Owner, tuple[bytes, int]] = OrderedDict()  # what policies were told on behalf of whom
        self._shared = [t for t, tier in enumerate(tiers) if tier.shared]
        self._lease_ttl = lease_ttl
        self._load_deadline = load_deadline
        self._probe_deadline = probe_deadline
        self._patience = patience

    # ---------------------------------------------------------------- lookup and lease

    def lookup(self, owner: Owner, chain: Chain, max_tokens: int, now: float, *, near: int | None = None) -> Lookup:
        """The longest hit of at most `max_tokens` tokens, leased to `owner` (replacing an older lease of this owner).

        `pending`: a shared tier is being asked; ask again when a report came or the probe's deadline passed. Each owner
        asks once per chain.

        With `near`, beyond so many tokens (which the engine has) only what is in DRAM counts, so that a load of it cannot
        fail, and nobody is asked.
        """
        state, counts = self.state, self.state.counts
        counts["lookups"] += 1
        if owner in state.failed:
            self.release(owner)
            return Lookup("miss", 0, {}, StopReason.FAILED_BEFORE)
        limit = min(len(chain.digests), max(0, max_tokens) // state.chunk_tokens)
        query = limit, max_tokens, near
        lease = self.leases.get(owner)
        if lease is not None and self._holds(lease, chain, query):
            lease.expires = now + self._lease_ttl
            counts["hit_tokens"] += lease.answer.tokens
            return lease.answer
        found = find(state, chain, limit, near=None if near is None else near // state.chunk_tokens)
        late = False
        if found.chunks < limit and self._shared and near is None:
            awaited, late = self._ask(owner, chain, limit, found, now)
            if awaited:
                self.release(owner)
                return Lookup("pending", 0, {}, StopReason.PROBING)
        stop, group = stop_of(state, chain, found, limit, max_tokens, late)
        if (self._curious or self.learner is not None) and chain.digests:
            self._tell(owner, chain, found)
        if not found.chunks:
            self.release(owner)
            return Lookup("miss", 0, {}, stop, group)
        tokens = found.chunks * state.chunk_tokens
        counts["hit_tokens"] += tokens
        sources = by_tier(state, found) if any(found.below) else {"dram": tokens}
        answer = Lookup("hit", tokens, sources, stop, group)
        self._lease(owner, chain, found, query, answer, now)
        return answer

    def release(self, owner: Owner) -> None:
        """End the owner's lease. Idempotent; jobs under way are not touched."""
        lease = self.leases.pop(owner, None)
        if lease is not None:
            self._unpin(lease)

    def forget(self, owner: Owner) -> None:
        """The request is over: end its lease, and the memory of its probes and its failed load."""
        self.release(owner)
        self._questions.pop(owner, None)
        self._told.pop(owner, None)
        self.state.failed.discard(owner)
        self.state.loading.pop(owner, None)

    # ---------------------------------------------------------------- jobs

    def begin_load(self, owner: Owner, now: float, *, tokens: int | None = None, skip: int = 0) -> int | None:
        """Load what was leased into the engine; the lease becomes references of the job. Returns the job's id.

        Args:
            owner: whose lease.
            now: seconds.
            tokens: take only so many, rounded down to a boundary legal for every group.
            skip: tokens the engine already has; chunks that lie wholly within them are not loaded.

        Returns:
            None if there is nothing (left) to load: no lease, expired, cleared, or all of it skipped.
        """
        lease = self._valid(owner, now)
        if lease is None:
            return None
        state, chain = self.state, lease.chain
        limit = lease.found.chunks if tokens is None else min(lease.found.chunks, max(0, tokens) // state.chunk_tokens)
        work = TrackedJob("load", owner, chain.namespace)
        found = self._hold(lease, limit, work)
        self.release(owner)
        if found.chunks * state.chunk_tokens <= skip:
            reports.release(work)
            return None
        planner.load(state, work, chain, found, max(0, skip))
        state.counts["loads"] += 1
        work.until = now + self._load_deadline + _GRACE
        job = state.jobs.start(work, self._load_deadline)
        self._overdue.append((work.until, job))
        state.loading.setdefault(owner, set()).add(job)
        return job

    def begin_prefetch(self, owner: Owner, now: float, *, skip: int = 0) -> int | None:
        """Bring what was leased into DRAM, as far as slots can be freed. The lease stays. Returns the job's id, or None.

        `skip`: tokens the engine already has; chunks that lie wholly within them are left where they are.
        """
        lease = self._valid(owner, now)
        if lease is None:
            return None
        work = TrackedJob("prefetch", owner, lease.chain.namespace)
        found = find(self.state, lease.chain, lease.found.chunks)
        work.pins = planner.pins_of(self.state, found)
        planner.prefetch(self.state, work, lease.chain, found, skip)
        if not work.ops:
            reports.release(work)
            return None
        for group, spans in work.inserted.items():
            pool = self.state.pools[group]
            lease.pins.append((pool, pool.pin([run for run, _ in spans])))
        return self.state.jobs.start(work, self._load_deadline)

    def begin_store(
        self,
        owner: Owner,
        chain: Chain,
        *,
        first: int,
        last: int,
        now: float,
        resident: Sequence[Sequence[bool]] | None = None,
    ) -> Store:
        """Copy chunks [first, last) from the engine into DRAM, of every group, unless they are there.

        `resident[group][position]` (position in the chain, not relative to `first`) says whether that chunk is whole in
        engine memory; default: all are. Objects become visible when every rank has acknowledged them.
        """
        if not 0 <= first <= last <= len(chain.digests):
            raise ValueError(f"chunks [{first}, {last}) are not part of a chain of {len(chain.digests)}")
        work, taken, skipped = planner.store(self.state, owner, chain, first, last, resident)
        job = self.state.jobs.start(work) if work.ops else None
        self.state.counts["stores"] += 1
        self.state.counts["stored_objects"] += len(work.ops)
        return Store(job, len(taken) * self.state.chunk_tokens, dict(skipped))

    def awaited(self, job: int) -> bool:
        """Whether some rank has not yet said how the job's ops ended."""
        work = self.state.jobs.live.get(job)
        return work is not None and not work.told

    def take_plan(self) -> Plan:
        """What the ranks do next. Every rank must get every plan, in order."""
        return self.state.jobs.take_plan()

    def report(self, report: Report, now: float) -> list[Finished]:
        """Apply a rank's report; returns the jobs that it ended. Idempotent; stale reports are ignored."""
        return self._ended(reports.apply(self.state, report))

    # ---------------------------------------------------------------- the outside world

    def announce(self, tier: int, rank: int, names: Iterable[Name], present: bool, now: float) -> None:
        """`rank` found (or removed) its part of these objects in a tier by other means: a scan, a janitor."""
        known = self.state.directories[tier]
        for name in names:
            if name.tokens != self.state.chunk_tokens or not 0 <= name.group < len(self.state.pools):
                continue
            if present:
                known.add(name, rank)
            elif known.remove(name, rank):
                self.state.pools[name.group].gone.put(name.chain, StopReason.EVICTED)

    def clear(self, namespace: bytes | None, now: float) -> int:
        """Forget everything (of one namespace) at once; returns how many objects left DRAM.

        Slots under a reader are freed when it ends. The caller clears the tiers; what is being written to them right now
        is deleted again when that write ends.
        """
        state = self.state
        for owner in [o for o, lease in self.leases.items() if namespace in (None, lease.chain.namespace)]:
            self.release(owner)
        dropped = sum(pool.clear(namespace) for pool in state.pools)
        for known in state.directories:
            known.clear(namespace)
        for work in list(state.jobs.live.values()):
            if namespace in (None, work.namespace):
                work.cleared = True
                if work.kind == "write_back" and state.jobs.withdraw(work):
                    reports.release(work)
        return dropped

    def tick(self, now: float) -> list[Finished]:
        """Let leases and deadlines expire; returns the loads that became late."""
        while self._expiring and (queued := self._expiring[0])[1].queued_until <= now:
            owner, lease = self._expiring.popleft()
            if self.leases.get(owner) is not lease:
                continue
            if lease.expires > now:  # renewed meanwhile
                lease.queued_until = lease.expires
                self._expiring.append(queued)
            else:
                self.release(owner)
                self.state.counts["leases_expired"] += 1
        while self._questions and next(iter(self._questions.values())).until + self._lease_ttl <= now:
            self._questions.popitem(last=False)
        finished: list[Finished] = []
        while self._overdue and self._overdue[0][0] <= now:
            work = self.state.jobs.live.get(self._overdue.popleft()[1])
            if work is not None and not work.told:
                finished.extend(reports.overdue(self.state, work))
        return self._ended(finished)

    def reset(self, now: float) -> list[Finished]:
        """A rank died: a new epoch. Jobs are void, arenas empty, leases dropped; what tiers hold is still known.

        Returns the void jobs, with nothing loaded. An owner whose load was under way counts as failed.
        """
        state = self.state
        for owner in list(self.leases):
            self.release(owner)
        void = state.jobs.reset()
        self._questions.clear()
        finished: list[Finished] = []
        deletes: list[tuple[int, Name]] = []
        for work in void:
            reports.release(work)
            deletes += [(op.tier, op.name) for op in work.ops if isinstance(op, Delete)]
            if work.kind == "write_back" and work.cleared:
                deletes += reports.written(work)
            if work.kind == "load" and not work.told:
                state.load_ended(work.owner, work.id, failed=True)
            statuses = (Status.CANCELLED,) * len(work.ops)
            loaded = work.ok_tokens if work.told or work.wanted is None else work.wanted.skip
            if not work.told_final:
                finished.append(Finished(work.id, work.kind, work.owner, loaded, statuses, True))
        for pool in state.pools:
            pool.reset()
        state.deleting.clear()
        for tier, name in deletes:
            state.delete(tier, [name])
        return finished

    def on_change(self, notice: Notice) -> None:
        """Have `notice` told of every object that becomes usable in a place, on all ranks, and of all that cease to be."""
        for group, pool in enumerate(self.state.pools):
            pool.notice = partial(_in_dram, notice, group)
        for tier, known in zip(self.state.tiers, self.state.directories, strict=True):
            known.notice = partial(_in_tier, notice, tier.name)

    def where(self, name: Name) -> tuple[str, ...]:
        """The places from which every rank could load this object: "dram", names of tiers."""
        state = self.state
        found = state.pools[name.group].find(name.namespace, name.chain, name.depth)
        places = ["dram"] if found is not None and found.ready else []
        below = zip(state.tiers, state.directories, strict=True)
        return (*places, *(t.name for t, known in below if known.has(name.namespace, name.group, name.chain)))

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what there is now."""
        state = self.state
        now = {
            "epoch": state.jobs.epoch,
            "jobs": len(state.jobs.live),
            "leases": len(self.leases),
            "failed_owners": len(state.failed),
            "evictions": self.evictions,
            "slots": sum(pool.slots for pool in state.pools),
            "slots_free": sum(pool.unused for pool in state.pools),
            "slots_leaving": sum(arena["evicting"] for arena in self.arenas()),
        }
        return dict(state.counts) | now

    @property
    def evictions(self) -> int:
        """Objects that left an arena to make room, since the start."""
        return sum(pool.evictions for pool in self.state.pools)

    @property
    def refused(self) -> int:
        """Objects that were not written to a tier because `admit` said so, since the start."""
        return self.state.counts["refused"]

    def arenas(self) -> list[dict[str, int]]:
        """Per group, how many slots are `free`, `writing`, `ready` and `evicting`."""
        found = []
        for pool in self.state.pools:
            leaving = sum(run.size for run in pool.leaving)
            ready = pool.slots - pool.unused - pool.writing - leaving
            found.append({"free": pool.unused, "writing": pool.writing, "ready": ready, "evicting": leaving})
        return found

    def check(self) -> None:
        """Raise `AssertionError` naming the first broken invariant. O(everything): for tests."""
        invariants.check(self.state, self.leases)

    # ---------------------------------------------------------------- internals

    def _tell(self, owner: Owner, chain: Chain, found: Found) -> None:
        """Tell the policies and the rule of admission that want to know what a request consists of, once for each request."""
        about = chain.digests[-1], len(chain.digests)
        if self._told.get(owner) == about:  # an engine may ask every step while a request waits
            return
        self._told[owner] = about
        if len(self._told) > _REMEMBERED_OWNERS:
            self._told.popitem(last=False)
        for group in self._curious:
            self.state.pools[group].policy.asked(chain.digests, found.resident(group))
        if self.learner is not None:
            lead = next((g for g, pool in enumerate(self.state.pools) if pool.chained), 0)
            self.learner(chain.digests, found.resident(lead), found.chunks)

    def _holds(self, lease: Lease, chain: Chain, query: _Query) -> bool:
        """Whether a lookup would find what this lease holds. Where all of a hit is in DRAM, `near` changes nothing."""
        if lease.version != self.state.version or (lease.chain is not chain and lease.chain != chain):
            return False
        return lease.query == query or (lease.query == (*query[:2], None) and not any(lease.found.below))

    def _lease(self, owner: Owner, chain: Chain, found: Found, query: _Query, answer: Lookup, now: float) -> None:
        """Lease a hit to `owner`."""
        old = self.leases.get(owner)
        again = old is not None and old.found.chunks == found.chunks and old.chain == chain
        pins: Pins = []
        for group, pool in enumerate(self.state.pools):
            extents = pool.carve(found.slices(group))
            pins.append((pool, pool.pin(extents)))
            if not again:  # an engine may ask every step while a request waits: that is one use
                pool.touch(extents)
        if old is not None:
            self._unpin(old)
        expires = now + self._lease_ttl
        if old is not None and again:
            lease, old.expires = old, expires
        else:
            self.leases[owner] = lease = Lease(chain, expires)
            self._expiring.append((owner, lease))
        lease.offer(found, query, answer, pins, self.state.version)

    def _hold(self, lease: Lease, limit: int, work: TrackedJob) -> Found:
        """The hit of at most `limit` chunks that a lease is for now, held by `work`. Without a walk where nothing changed."""
        if limit == lease.found.chunks and lease.version == self.state.version:
            work.pins, lease.pins = lease.pins, []
            return lease.found
        found = find(self.state, lease.chain, limit)
        work.pins = planner.pins_of(self.state, found)
        return found

    def _ended(self, finished: list[Finished]) -> list[Finished]:
        for end in finished:
            if end.kind == "load" and end.owner in self.state.failed:
                self.release(end.owner)  # it may have asked again meanwhile
        return finished

    def _unpin(self, lease: Lease) -> None:
        for pool, spans in lease.pins:
            pool.unpin(spans)
        lease.pins = []

    def _valid(self, owner: Owner, now: float) -> Lease | None:
        lease = self.leases.get(owner)
        if lease is not None and (lease.expires <= now or owner in self.state.failed):
            self.release(owner)
            return None
        return lease

    def _ask(self, owner: Owner, chain: Chain, limit: int, found: Found, now: float) -> tuple[bool, bool]:
        """Probe shared tiers for what is missing; (still waiting, waited in vain)."""
        about = (chain.namespace, chain.digests[limit - 1], limit)
        question = self._questions.get(owner)
        if question is None or question.about != about:
            work = self._probe(owner, chain, limit, found)
            job = self.state.jobs.start(work, self._probe_deadline) if work.ops else 0
            question = _Question(about, job, now + self._probe_deadline + self._patience)
            self._questions[owner] = question
            self._questions.move_to_end(owner)
        asked = self.state.jobs.live.get(question.job)
        if asked is None or asked.told:
            return False, False
        return now < question.until, now >= question.until

    def _probe(self, owner: Owner, chain: Chain, limit: int, found: Found) -> TrackedJob:
        state = self.state
        work = TrackedJob("probe", owner, chain.namespace)
        for group, rule in enumerate(state.rules):
            for i in range(1 if rule.kind == "whole" else limit):
                digest, depth = chain.digests[i], chain.depth(i)
                if state.source(chain.namespace, digest, group, depth) is None:
                    name = state.name(chain.namespace, digest, group, depth)
                    work.ops.extend(Probe(name, t) for t in self._shared)
        return work


def _in_dram(notice: Notice, group: int, there: bool, namespace: bytes, digest: bytes) -> None:
    notice(there, "dram", namespace, group, digest)


def _in_tier(notice: Notice, tier: str, there: bool, namespace: bytes, group: int, digest: bytes) -> None:
    notice(there, tier, namespace, group, digest)
