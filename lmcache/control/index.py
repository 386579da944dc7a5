"""The index: which objects exist where, which are leased, and which slot is used next. Plain, deterministic Python.

Single-threaded; no KV bytes, no I/O and no clock: callers pass the time as `now`, in seconds, never decreasing. Emits plans
and consumes reports (`lmcache.plan`); lost, duplicate, late or reordered reports do not make it wrong.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from lmcache.config import Config
from lmcache.control import invariants, planner, reports
from lmcache.control.eviction import PolicyFactory, hears, policy_factory
from lmcache.control.extents import ExtentPin
from lmcache.control.jobs import TrackedJob
from lmcache.control.lookup import FoundHit, by_tier, find, stop_of
from lmcache.control.outcomes import Finished, Lookup, Owner, StopReason, Store, TierInfo
from lmcache.control.slot_pool import SlotPool
from lmcache.control.state import Admit, State
from lmcache.errors import ConfigError
from lmcache.plan import Chain, Delete, Name, Plan, Probe, Report, Status
from lmcache.spec import HitRule

_GRACE = 1.0
"""Seconds past a load's deadline after which a rank that has not reported counts as late."""

_REMEMBERED_OWNERS = 16_384
"""Owners whose last observed request is remembered, at most; bounds the memory of owners for which `forget` is never called."""


Pins = list[tuple[SlotPool, list[ExtentPin]]]
_Query = tuple[int, int, int | None]

Notice = Callable[[bool, str, bytes, int, bytes], None]
"""(usable from now on, place: "dram" or a tier's name, namespace, group, digest)"""


class Lease:
    """A hit granted to an owner; protected from eviction until it is loaded, released or expired.

    Attributes:
        chain, hit: the hit, which is valid while `State.version` equals `version`.
        query: `limit`, `max_tokens` and `near` of the lookup that found it.
        answer: what that lookup returned.
        pins: of the part of the hit in DRAM, one entry per group; then of what was promoted for it since.
        expires: seconds.
        queued_until: when `Index.tick` compares `expires` next, in seconds.
    """

    __slots__ = ("answer", "chain", "expires", "hit", "pins", "query", "queued_until", "version")

    def __init__(self, chain: Chain, expires: float) -> None:
        self.chain = chain
        self.expires = self.queued_until = expires

    def grant(self, hit: FoundHit, query: _Query, answer: Lookup, pins: Pins, version: int) -> None:
        """Sets the hit that is leased."""
        self.hit = hit
        self.query = query
        self.answer = answer
        self.pins = pins
        self.version = version


class _PendingProbe(NamedTuple):
    """A probe of shared tiers for an owner and a query (namespace, last digest, chunks)."""

    query: tuple[bytes, bytes, int]
    job_id: int
    until: float


class Index:
    """What exists where, on all `ranks` of one engine.

    Args:
        groups: name and hit rule of each layer group.
        chunk_tokens: tokens per chunk.
        slots: arena slots of each group, the same on every rank; 0: this group is never kept in DRAM.
        ranks: number of ranks that execute the plans; an object exists only if all of them have their part.
        tiers: the tiers below DRAM, nearest first.
        policy: eviction policy by name (`lmcache.control.eviction.POLICIES`), or a factory called once per arena.
        lease_ttl: seconds after which a lease that was neither loaded nor released expires.
        load_deadline: seconds a load may take before it counts as failed.
        probe_deadline: seconds a probe of shared tiers may take.
        patience: additional seconds that a lookup waits for the result of a probe, for engines whose plans and reports travel
            with steps that may take long.
        admit: decides whether an object that became ready is written to a tier; default: all are. See
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
        lease_ttl: float = Config.lease_s,
        load_deadline: float = Config.load_timeout_s,
        probe_deadline: float = Config.probe_timeout_s,
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
        self._expiring: deque[tuple[Owner, Lease]] = deque()  # ordered by `queued_until`
        self._deadlines: deque[tuple[float, int]] = deque()  # (time, load job), in order
        self._probes: OrderedDict[Owner, _PendingProbe] = OrderedDict()
        # Groups whose policy observes requests. Only those of rule `all`: the others store a window or the last state of a
        # request, not all of its chunks, so requests do not predict which of their objects are used.
        self._observed_groups = [
            g for g, pool in enumerate(self.state.pools) if hears(pool.policy) and self.state.rules[g].kind == "all"
        ]
        self.learner = getattr(admit, "asked", None)  # see `lmcache.control.admission.rules.Learns`
        self._observed: OrderedDict[Owner, tuple[bytes, int]] = OrderedDict()  # owner → last request that was observed
        self._shared = [t for t, tier in enumerate(tiers) if tier.shared]
        self._lease_ttl = lease_ttl
        self._load_deadline = load_deadline
        self._probe_deadline = probe_deadline
        self._patience = patience

    # ---------------------------------------------------------------- lookup and lease

    def lookup(self, owner: Owner, chain: Chain, max_tokens: int, now: float, *, near: int | None = None) -> Lookup:
        """Returns the longest hit of at most `max_tokens` tokens and leases it to `owner`, replacing its older lease.

        Status `pending`: a shared tier is being probed; look up again after a report, or when the probe's deadline has
        passed. Each owner probes once per chain.

        With `near` (tokens that the engine has itself), chunks beyond it count only if they are in DRAM, so that loading
        them cannot fail, and no tier is probed.
        """
        state, counts = self.state, self.state.counts
        counts["lookups"] += 1
        if owner in state.failed:
            self.release(owner)
            return Lookup("miss", 0, {}, StopReason.FAILED_BEFORE)
        limit = min(len(chain.digests), max(0, max_tokens) // state.chunk_tokens)
        query = limit, max_tokens, near
        lease = self.leases.get(owner)
        if lease is not None and self._is_current(lease, chain, query):
            lease.expires = now + self._lease_ttl
            counts["hit_tokens"] += lease.answer.tokens
            return lease.answer
        hit = find(state, chain, limit, near=None if near is None else near // state.chunk_tokens)
        late = False
        if hit.chunks < limit and self._shared and near is None:
            pending, late = self._probe(owner, chain, limit, now)
            if pending:
                self.release(owner)
                return Lookup("pending", 0, {}, StopReason.PROBING)
        stop, group = stop_of(state, chain, hit, limit, max_tokens, late)
        if (self._observed_groups or self.learner is not None) and chain.digests:
            self._observe(owner, chain, hit)
        if not hit.chunks:
            self.release(owner)
            return Lookup("miss", 0, {}, stop, group)
        tokens = hit.chunks * state.chunk_tokens
        counts["hit_tokens"] += tokens
        sources = by_tier(state, hit) if any(hit.below) else {"dram": tokens}
        answer = Lookup("hit", tokens, sources, stop, group)
        self._lease(owner, chain, hit, query, answer, now)
        return answer

    def release(self, owner: Owner) -> None:
        """Ends the owner's lease. Idempotent; does not affect jobs under way."""
        lease = self.leases.pop(owner, None)
        if lease is not None:
            self._unpin(lease)

    def forget(self, owner: Owner) -> None:
        """Ends a request: its lease, and what is remembered of its probes and failed load."""
        self.release(owner)
        self._probes.pop(owner, None)
        self._observed.pop(owner, None)
        self.state.failed.discard(owner)
        self.state.loading.pop(owner, None)

    # ---------------------------------------------------------------- jobs

    def begin_load(self, owner: Owner, now: float, *, tokens: int | None = None, skip: int = 0) -> int | None:
        """Loads the leased hit into the engine; the lease's pins pass to the job. Returns the job's id.

        Args:
            owner: the owner of the lease.
            now: seconds.
            tokens: loads at most so many tokens, rounded down to a boundary legal for every group.
            skip: leading tokens already resident in the engine; chunks that lie wholly within them are not loaded.

        Returns:
            None if there is nothing (left) to load: no lease, expired, cleared, or all of it skipped.
        """
        lease = self._valid_lease(owner, now)
        if lease is None:
            return None
        state, chain = self.state, lease.chain
        limit = lease.hit.chunks if tokens is None else min(lease.hit.chunks, max(0, tokens) // state.chunk_tokens)
        job = TrackedJob("load", owner, chain.namespace)
        hit = self._pass_pins(lease, limit, job)
        self.release(owner)
        if hit.chunks * state.chunk_tokens <= skip:
            reports.release(job)
            return None
        with self._undone(job):
            planner.load(state, job, chain, hit, max(0, skip))
        state.counts["loads"] += 1
        job.until = now + self._load_deadline + _GRACE
        state.jobs.start(job, self._load_deadline)
        self._deadlines.append((job.until, job.id))
        state.loading.setdefault(owner, set()).add(job.id)
        return job.id

    def begin_prefetch(self, owner: Owner, now: float, *, skip: int = 0) -> int | None:
        """Promotes the leased hit to DRAM, as far as slots can be freed. The lease stays. Returns the job's id, or None.

        `skip`: leading tokens already resident in the engine; chunks that lie wholly within them are not promoted.
        """
        lease = self._valid_lease(owner, now)
        if lease is None:
            return None
        job = TrackedJob("prefetch", owner, lease.chain.namespace)
        hit = find(self.state, lease.chain, lease.hit.chunks)
        job.pins = planner.pins_of(self.state, hit)
        with self._undone(job):
            planner.prefetch(self.state, job, lease.chain, hit, skip)
        if not job.ops:
            reports.release(job)
            return None
        for group, pins in job.inserted.items():
            pool = self.state.pools[group]
            lease.pins.append((pool, pool.pin([extent for extent, _ in pins])))
        return self.state.jobs.start(job, self._load_deadline)

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
        """Copies chunks [first, last) of every group from the engine into DRAM, unless they are there already.

        `resident[group][position]` (position in the chain, not relative to `first`): whether all of that chunk is in engine
        memory; default: all chunks are. An object becomes visible once every rank has acknowledged it.
        """
        if not 0 <= first <= last <= len(chain.digests):
            raise ValueError(f"chunks [{first}, {last}) are not part of a chain of {len(chain.digests)}")
        job = TrackedJob("store", owner, chain.namespace)
        with self._undone(job):
            taken, skipped = planner.store(self.state, job, chain, first, last, resident)
        job_id = self.state.jobs.start(job) if job.ops else None
        self.state.counts["stores"] += 1
        self.state.counts["stored_objects"] += len(job.ops)
        return Store(job_id, len(taken) * self.state.chunk_tokens, dict(skipped))

    def awaited(self, job: int) -> bool:
        """Whether some rank has not yet reported how the job's ops ended."""
        live = self.state.jobs.live.get(job)
        return live is not None and not live.concluded

    def take_plan(self) -> Plan:
        """Returns what the ranks do next. Every rank must receive every plan, in order."""
        return self.state.jobs.take_plan()

    def report(self, report: Report, now: float) -> list[Finished]:
        """Applies a rank's report; returns the jobs that it ended. Idempotent; stale reports are ignored."""
        return self._end_failed_leases(reports.apply(self.state, report))

    # ---------------------------------------------------------------- changes from outside

    def announce(self, tier: int, rank: int, names: Iterable[Name], present: bool, now: float) -> None:
        """Records that `rank` has (or no longer has) its part of these objects in a tier, as seen by a scan or a janitor."""
        directory = self.state.directories[tier]
        for name in names:
            if name.tokens != self.state.chunk_tokens or not 0 <= name.group < len(self.state.pools):
                continue
            if present:
                directory.add(name, rank)
            elif directory.remove(name, rank):
                self.state.pools[name.group].gone.put(name.chain, StopReason.EVICTED)

    def clear(self, namespace: bytes | None, now: float) -> int:
        """Forgets everything (of one namespace) at once; returns the number of objects that left DRAM.

        Slots that are being read are freed when the read ends. The caller clears the tiers; what is being written to them at
        the moment is deleted when that write ends.
        """
        jobs = self.state.jobs
        dropped = self._forget_objects(namespace)
        self._forget_unwritten(namespace)
        for job in list(jobs.live.values()):
            if namespace in (None, job.namespace):
                job.cleared = True
                if job.kind == "write_back" and jobs.withdraw(job):
                    reports.release(job)
        return dropped

    def cleared_elsewhere(self, namespace: bytes | None) -> None:
        """Forgets everything (of one namespace), because another process has cleared it from the tiers.

        Unlike after `clear`, write-backs under way are left to the tiers, which refuse what was gathered before: what another
        process has written since must not be deleted. What is lost for the tiers, although it may have been stored since, is
        remembered as not written.
        """
        state = self.state
        self._forget_objects(namespace)
        for job in state.jobs.live.values():
            if namespace not in (None, job.namespace):
                continue
            job.cleared = job.cleared or job.kind == "probe"
            if job.kind == "store" and not job.concluded:
                for tier in range(len(state.tiers)):
                    for op in job.ops:
                        state.not_written(tier, op.name, "cancelled")

    def drop_all(self) -> int:
        """Forgets everything at once, for callers whose names have changed; returns the number of objects that left DRAM.

        Unlike after `clear`, what is on tiers stays there, and write-backs under way finish: under the names that they have,
        these objects are still right.
        """
        self._forget_unwritten(None)
        return self._forget_objects(None)

    def tick(self, now: float) -> list[Finished]:
        """Expires leases and applies deadlines; returns the loads that became late."""
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
        while self._probes and next(iter(self._probes.values())).until + self._lease_ttl <= now:
            self._probes.popitem(last=False)
        finished: list[Finished] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self.state.jobs.live.get(self._deadlines.popleft()[1])
            if job is not None and not job.concluded:
                finished.extend(reports.overdue(self.state, job))
        return self._end_failed_leases(finished)

    def reset(self, now: float) -> list[Finished]:
        """Starts a new epoch after a rank died: jobs are void, arenas empty, leases dropped; tier directories stay.

        Returns the void jobs, with nothing loaded. An owner whose load was under way counts as failed.
        """
        state = self.state
        for owner in list(self.leases):
            self.release(owner)
        void = state.jobs.reset()
        self._probes.clear()
        finished: list[Finished] = []
        deletes: list[tuple[int, Name]] = []
        for job in void:
            reports.release(job)
            deletes += [(op.tier, op.name) for op in job.ops if isinstance(op, Delete)]
            if job.kind == "write_back" and job.cleared:
                deletes += reports.written(job)
            if job.kind == "load" and not job.concluded:
                state.load_ended(job.owner, job.id, failed=True)
            statuses = (Status.CANCELLED,) * len(job.ops)
            loaded = job.ok_tokens if job.concluded or job.target is None else job.target.skip
            if not job.returned_final:
                finished.append(Finished(job.id, job.kind, job.owner, loaded, statuses, True))
        for pool in state.pools:
            pool.reset()
        state.deleting.clear()
        for tier, name in deletes:
            state.delete(tier, [name])
        return finished

    def on_change(self, notice: Notice) -> None:
        """Calls `notice` for every object that becomes, or ceases to be, usable in a place on all ranks."""
        for group, pool in enumerate(self.state.pools):
            pool.notice = partial(_in_dram, notice, group)
        for tier, directory in zip(self.state.tiers, self.state.directories, strict=True):
            directory.notice = partial(_in_tier, notice, tier.name)

    def where(self, name: Name) -> tuple[str, ...]:
        """Returns the places from which every rank could load this object: "dram", names of tiers."""
        state = self.state
        found = state.pools[name.group].find(name.namespace, name.chain, name.depth)
        places = ["dram"] if found is not None and found.ready else []
        below = zip(state.tiers, state.directories, strict=True)
        return (*places, *(tier.name for tier, d in below if d.has(name.namespace, name.group, name.chain)))

    def stats(self) -> dict[str, int]:
        """Returns counts since the start, and current numbers of jobs, leases and slots."""
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
        """Objects evicted from the arenas since the start."""
        return sum(pool.evictions for pool in self.state.pools)

    @property
    def refused(self) -> int:
        """Objects that were not written to a tier because `admit` refused them, since the start."""
        return self.state.counts["refused"]

    def arenas(self) -> list[dict[str, int]]:
        """Returns, per group, how many slots are `free`, `writing`, `ready` and `evicting`."""
        arenas = []
        for pool in self.state.pools:
            leaving = sum(extent.size for extent in pool.leaving)
            ready = pool.slots - pool.unused - pool.writing - leaving
            arenas.append({"free": pool.unused, "writing": pool.writing, "ready": ready, "evicting": leaving})
        return arenas

    def check(self) -> None:
        """Raises `AssertionError` with the first broken invariant. Takes time proportional to all objects: for tests."""
        invariants.check(self.state, self.leases)

    # ---------------------------------------------------------------- internals

    @contextmanager
    def _undone(self, job: TrackedJob) -> Iterator[None]:
        """Undoes what was planned so far if an exception is raised: slots that the job took are free again."""
        try:
            yield
        except BaseException:
            for group, pins in job.inserted.items():
                self.state.pools[group].discard(pins)
            reports.release(job)
            raise

    def _forget_objects(self, namespace: bytes | None) -> int:
        """Ends leases and forgets objects (of one namespace), in DRAM and on tiers; returns how many were in DRAM."""
        state = self.state
        for owner in [o for o, lease in self.leases.items() if namespace in (None, lease.chain.namespace)]:
            self.release(owner)
        dropped = sum(pool.clear(namespace) for pool in state.pools)
        for directory in state.directories:
            directory.clear(namespace)
        return dropped

    def _forget_unwritten(self, namespace: bytes | None) -> None:
        """Forgets which objects (of one namespace) did not reach their tier."""
        state = self.state
        for key in [key for key in state.unwritten if namespace in (None, key[1].namespace)]:
            del state.unwritten[key]
        if namespace is None:
            state.counts.pop("unwritten_forgotten", None)

    def _observe(self, owner: Owner, chain: Chain, hit: FoundHit) -> None:
        """Passes the request to the policies and the admission rule that learn from requests, once per request."""
        request = chain.digests[-1], len(chain.digests)
        if self._observed.get(owner) == request:  # an engine may look up every step while a request waits
            return
        self._observed[owner] = request
        if len(self._observed) > _REMEMBERED_OWNERS:
            self._observed.popitem(last=False)
        for group in self._observed_groups:
            self.state.pools[group].policy.asked(chain.digests, hit.resident(group))
        if self.learner is not None:
            lead = next((g for g, pool in enumerate(self.state.pools) if pool.chained), 0)
            self.learner(chain.digests, hit.resident(lead), hit.chunks)

    def _is_current(self, lease: Lease, chain: Chain, query: _Query) -> bool:
        """Whether a lookup would find the leased hit again. `near` makes no difference where all of the hit is in DRAM."""
        if lease.version != self.state.version or (lease.chain is not chain and lease.chain != chain):
            return False
        return lease.query == query or (lease.query == (*query[:2], None) and not any(lease.hit.below))

    def _lease(self, owner: Owner, chain: Chain, hit: FoundHit, query: _Query, answer: Lookup, now: float) -> None:
        """Leases a hit to `owner`."""
        old = self.leases.get(owner)
        again = old is not None and old.hit.chunks == hit.chunks and old.chain == chain
        pins: Pins = []
        for group, pool in enumerate(self.state.pools):
            extents = hit.extents(group)
            pins.append((pool, pool.pin(extents)))
            if not again:  # an engine may look up every step while a request waits: that is one use
                pool.touch(extents)
        if old is not None:
            self._unpin(old)
        expires = now + self._lease_ttl
        if old is not None and again:
            lease, old.expires = old, expires
        else:
            self.leases[owner] = lease = Lease(chain, expires)
            self._expiring.append((owner, lease))
        lease.grant(hit, query, answer, pins, self.state.version)

    def _pass_pins(self, lease: Lease, limit: int, job: TrackedJob) -> FoundHit:
        """Returns the lease's hit of at most `limit` chunks, pinned by `job`. Reuses the lease's pins if nothing changed."""
        if limit == lease.hit.chunks and lease.version == self.state.version:
            job.pins, lease.pins = lease.pins, []
            return lease.hit
        hit = find(self.state, lease.chain, limit)
        job.pins = planner.pins_of(self.state, hit)
        return hit

    def _end_failed_leases(self, finished: list[Finished]) -> list[Finished]:
        for end in finished:
            if end.kind == "load" and end.owner in self.state.failed:
                self.release(end.owner)  # it may have looked up again meanwhile
        return finished

    def _unpin(self, lease: Lease) -> None:
        for pool, pins in lease.pins:
            pool.unpin(pins)
        lease.pins = []

    def _valid_lease(self, owner: Owner, now: float) -> Lease | None:
        lease = self.leases.get(owner)
        if lease is not None and (lease.expires <= now or owner in self.state.failed):
            self.release(owner)
            return None
        return lease

    def _probe(self, owner: Owner, chain: Chain, limit: int, now: float) -> tuple[bool, bool]:
        """Probes shared tiers for missing objects; returns (pending, timed out)."""
        query = (chain.namespace, chain.digests[limit - 1], limit)
        probe = self._probes.get(owner)
        if probe is None or probe.query != query:
            job = self._probe_job(owner, chain, limit)
            job_id = self.state.jobs.start(job, self._probe_deadline) if job.ops else 0
            probe = _PendingProbe(query, job_id, now + self._probe_deadline + self._patience)
            self._probes[owner] = probe
            self._probes.move_to_end(owner)
        live = self.state.jobs.live.get(probe.job_id)
        if live is None or live.concluded:
            return False, False
        return now < probe.until, now >= probe.until

    def _probe_job(self, owner: Owner, chain: Chain, limit: int) -> TrackedJob:
        state = self.state
        job = TrackedJob("probe", owner, chain.namespace)
        for group, rule in enumerate(state.rules):
            for i in range(1 if rule.kind == "whole" else limit):
                digest, depth = chain.digests[i], chain.depth(i)
                if state.source(chain.namespace, digest, group, depth) is None:
                    name = state.name(chain.namespace, digest, group, depth)
                    job.ops.extend(Probe(name, t) for t in self._shared)
        return job


def _in_dram(notice: Notice, group: int, usable: bool, namespace: bytes, digest: bytes) -> None:
    notice(usable, "dram", namespace, group, digest)


def _in_tier(notice: Notice, tier: str, usable: bool, namespace: bytes, group: int, digest: bytes) -> None:
    notice(usable, tier, namespace, group, digest)
