"""Random histories of the index: ranks fail, hang and die; reports are lost, duplicated, late and out of order.

    class TestMyIndex(IndexMachineTests):
        def open_index(self, groups, slots, **settings):
            return MyIndex(groups, CHUNK, slots, **settings)

The invariants of all of them are in `index_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as flatten

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from lmcache.control import TierInfo
from lmcache.control.eviction import POLICIES
from lmcache.plan import ArenaSlot, Chain, Copy, Status
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.indexlab import CHUNK, Content, chain, drain, name_at
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.index_factory import IndexFactory
from lmcache_conformance.suites.index_model import LEASE_S, PROBE_S, Groups, IndexModel, Load
from lmcache_conformance.suites.tier_machine import run_machine

GROUPS: list[Groups] = [
    [("full", ALL)],
    [("full", ALL), ("sliding", trailing(5))],
    [("full", ALL), ("mamba", HitRule("state_at")), ("cross", HitRule("whole"))],
    [("a", ALL), ("b", ALL)],
    [("sliding", trailing(8))],
    [("mamba", HitRule("state_at")), ("sliding", trailing(5))],
]
TIERS: list[list[TierInfo]] = [
    [],
    [TierInfo("disk")],
    [TierInfo("disk"), TierInfo("redis", shared=True)],
    [TierInfo("nfs", shared=True)],
]
CHAINS = st.builds(chain, st.sampled_from(["one", "two"]), st.sampled_from(["abcd", "abce", "abxyz"]))
OWNERS = st.integers(0, 2)
FAULTS: st.SearchStrategy[Status | str | None] = st.sampled_from(
    [*[None] * 8, "hang", Status.FAILED, Status.FULL, Status.SKIPPED, Status.CORRUPT, Status.MISSING]
)
FATES = st.sampled_from(["deliver", "deliver", "deliver", "twice", "delay", "lose"])
HOLES = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=2)
PICK = st.integers(0, 1_000_000)


class IndexMachine(IndexModel):
    """Generates what engines do, and what happens to ranks and reports."""

    @initialize(
        groups=st.sampled_from(GROUPS),
        tiers=st.sampled_from(TIERS),
        slots=st.lists(st.integers(0, 5), min_size=3, max_size=3),
        count=st.integers(1, 3),
        policy=st.sampled_from(sorted(POLICIES)),
        warm=st.lists(CHAINS, max_size=3),
    )
    def start(
        self,
        groups: Groups,
        tiers: Sequence[TierInfo],
        slots: Sequence[int],
        count: int,
        policy: str,
        warm: Sequence[Chain],
    ) -> None:
        self.begin(groups, tiers, slots, count, policy)
        for about in warm:
            self.store(0, about, (0, 0), set())
            self.run_all(2)

    # ------------------------------------------------------------ what an engine does

    @rule(owner=OWNERS, about=CHAINS, tokens=st.integers(0, 24))
    def lookup(self, owner: int, about: Chain, tokens: int) -> None:
        found = self.index.lookup(owner, about, tokens, self.now)
        self.last[owner] = about, tokens
        self.hits.pop(owner, None)
        if owner in self.failed:
            assert found[:2] == ("miss", 0), "offered again after a failed load"
            assert found.stop == "failed_before"
            return
        limit = min(len(about.digests), tokens // CHUNK)
        if found.status == "pending":
            assert any(tier.shared for tier in self.tiers)
            began = self.probed(owner, about, limit)
            if self.now >= began + PROBE_S + LEASE_S:  # the index drops old probes, and probes again
                self.probes[owner] = (self.probes[owner][0], began := self.now)
            assert self.now < began + PROBE_S, "pending past the deadline"
            return
        if found.tokens < limit * CHUNK and any(tier.shared for tier in self.tiers):
            self.probed(owner, about, limit)
        legal = [n for n in range(limit + 1) if self.legal(about, n)]
        assert found.tokens == max(legal) * CHUNK
        assert found.status == ("hit" if found.tokens else "miss")
        assert sum(found.by_tier.values()) == found.tokens
        if found.tokens == len(about.digests) * CHUNK:
            assert found.stop in ("end", "tail")
        if found.tokens:
            self.hits[owner] = about, found.tokens
            self.leased[owner] = self.now + LEASE_S, self.slots_of(about, found.tokens // CHUNK)

    @rule(owner=OWNERS, salted=st.booleans(), load=st.booleans())
    def look_up_again(self, owner: int, salted: bool, load: bool) -> None:
        """Repeats a lookup, as engines do in every step of a waiting request; or under another salt with equal digests."""
        about, tokens = self.last.get(owner, (chain("one", "abcd"), 24))
        if salted:
            about = Chain({b"o": b"two", b"t": b"one"}[about.namespace[:1]].ljust(32, b"."), about.digests)
        self.lookup(owner, about, tokens)
        if load:
            self.load(owner, None, 0)

    @rule(owner=OWNERS, tokens=st.none() | st.integers(0, 24), skip=st.sampled_from([0, 0, 0, 3, 4, 9]))
    def load(self, owner: int, tokens: int | None, skip: int) -> None:
        job = self.index.begin_load(owner, self.now, tokens=tokens, skip=skip)
        about, offered = self.hits.pop(owner, (None, 0))
        if about is None or self.leased[owner][0] <= self.now:
            assert job is None, "loaded without a valid lease"
        elif job is not None:
            limit = offered if tokens is None else min(offered, tokens)
            self.loads[job] = Load(owner, about, skip, limit, self.versions.get(about.namespace, 0))

    @rule(owner=OWNERS, about=CHAINS, tokens=st.none() | st.integers(0, 24), skip=st.sampled_from([0, 0, 0, 3, 4, 9]))
    def serve(self, owner: int, about: Chain, tokens: int | None, skip: int) -> None:
        """Looks up and loads in one step, as many engines do."""
        self.lookup(owner, about, 24)
        self.load(owner, tokens, skip)

    @rule(owner=OWNERS, about=CHAINS, tokens=st.integers(0, 24), have=st.sampled_from([0, 0, 3, 4, 9]))
    def near(self, owner: int, about: Chain, tokens: int, have: int) -> None:
        """Looks up with `near`: beyond what the engine has itself, only DRAM counts, so that the load cannot fail."""
        self.hits.pop(owner, None)
        found = self.index.lookup(owner, about, tokens, self.now, near=have)
        self.last[owner] = about, tokens
        if owner in self.failed:
            assert found[:2] == ("miss", 0), "offered again after a failed load"
            return
        assert found.status == ("hit" if found.tokens else "miss"), "a lookup with `near` never waits for a probe"
        assert found.tokens <= tokens
        assert self.legal(about, found.tokens // CHUNK)
        if not found.tokens:
            return
        self.hits[owner] = about, found.tokens
        self.leased[owner] = self.now + LEASE_S, self.slots_of(about, found.tokens // CHUNK)
        before = set(self.loads)
        self.load(owner, None, have)
        for job in set(self.loads) - before:
            sources = [op.src for op in self.index.state.jobs.live[job].ops if isinstance(op, Copy)]
            assert all(isinstance(source, ArenaSlot) for source in sources), f"loads from outside of DRAM: {sources}"

    @rule(owner=OWNERS, about=CHAINS, look_up=st.booleans(), skip=st.sampled_from([0, 0, 4, 9]))
    def prefetch(self, owner: int, about: Chain, look_up: bool, skip: int) -> None:
        if look_up:
            self.lookup(owner, about, 24)
        self.index.begin_prefetch(owner, self.now, skip=skip)

    @rule(owner=OWNERS)
    def release(self, owner: int) -> None:
        self.index.release(owner)
        self.hits.pop(owner, None)

    @rule(owner=OWNERS)
    def forget(self, owner: int) -> None:
        self.index.forget(owner)
        self.hits.pop(owner, None)
        for load in self.loads.values():
            if load.owner == owner:
                load.owner = None
        self.failed.discard(owner)
        self.probes.pop(owner, None)

    @rule(
        owner=OWNERS,
        about=CHAINS,
        bounds=st.tuples(PICK, PICK),
        holes=HOLES,
    )
    def store(self, owner: int, about: Chain, bounds: tuple[int, int], holes: set[tuple[int, int]]) -> None:
        count = len(about.digests)
        first, last = sorted(b % (count + 1) for b in bounds)
        if bounds[0] % 3 == 0:
            first, last = 0, count
        resident = [[(g, i) not in holes for i in range(count)] for g in range(len(self.groups))]
        stored = self.index.begin_store(owner, about, first=first, last=last, now=self.now, resident=resident)
        if stored.job is not None:
            self.stored[stored.job] = self.versions.get(about.namespace, 0)
        assert (stored.job is None) == (stored.accepted == 0)
        assert stored.accepted <= (last - first) * CHUNK

    @rule(both=st.booleans(), about=CHAINS)
    def clear(self, both: bool, about: Chain) -> None:
        self.index.clear(None if both else about.namespace, self.now)
        for space in {b"one".ljust(32, b"."), b"two".ljust(32, b".")} if both else {about.namespace}:
            self.versions[space] = self.versions.get(space, 0) + 1
            self.hits = {o: hit for o, hit in self.hits.items() if hit[0].namespace != space}
            for tier in flatten.from_iterable(rank.tiers for rank in self.ranks):
                for name in [n for n in tier if n.namespace == space]:
                    del tier[name]

    # ------------------------------------------------------------ what happens to ranks and reports

    @rule(picks=st.lists(st.tuples(PICK, FAULTS), max_size=12), fates=st.lists(FATES, min_size=3, max_size=3))
    def round_trip(self, picks: list[tuple[int, Status | str | None]], fates: list[str]) -> None:
        """Delivers a plan to all ranks, runs some of the ops, and delivers, delays, duplicates or loses each rank's report."""
        self.plan()
        for rank in self.ranks:
            while rank.inbox:
                rank.take()
        for pick, fault in picks:
            if any(rank.pending() for rank in self.ranks):
                self.step(pick, fault)
        for i, fate in enumerate(fates[: len(self.ranks)]):
            self.send(i)
            if fate != "delay":
                report = self.network[-1]
                if fate != "twice":
                    self.network.pop()
                if fate != "lose":
                    self.ended(self.index.report(report, self.now))

    @rule()
    def plan(self) -> None:
        plan = self.index.take_plan()
        for rank in self.ranks:
            rank.inbox.append((plan, self.stored))

    @precondition(lambda self: any(rank.inbox for rank in self.ranks))
    @rule(pick=PICK)
    def take(self, pick: int) -> None:
        full = [rank for rank in self.ranks if rank.inbox]
        full[pick % len(full)].take()

    @precondition(lambda self: any(rank.pending() for rank in self.ranks))
    @rule(pick=PICK, fault=FAULTS)
    def step(self, pick: int, fault: Status | str | None) -> None:
        todo = [(rank, run, i) for rank in self.ranks for run, i in rank.pending()]
        rank, run, i = todo[pick % len(todo)]
        rank.step(run, i, fault)

    @precondition(lambda self: any(rank.runs for rank in self.ranks))
    @rule(pick=PICK)
    def expire(self, pick: int) -> None:
        todo = [(rank, run) for rank in self.ranks for run in rank.runs.values() if not run.late]
        if todo:
            rank, run = todo[pick % len(todo)]
            rank.expire(run)

    @rule(pick=PICK)
    def send(self, pick: int) -> None:
        self.network.append(self.ranks[pick % len(self.ranks)].report())

    @precondition(lambda self: self.network)
    @rule(pick=PICK, twice=st.booleans())
    def deliver(self, pick: int, twice: bool) -> None:
        report = self.network[pick % len(self.network)]
        if not twice:
            self.network.remove(report)
        self.ended(self.index.report(report, self.now))

    @precondition(lambda self: self.network)
    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        self.network.pop(pick % len(self.network))

    @rule(rounds=st.integers(1, 3))
    def run_all(self, rounds: int) -> None:
        for _ in range(rounds):
            self.plan()
            for report in drain(self.ranks):
                self.ended(self.index.report(report, self.now))

    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0, 7.0, 25.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.ended(self.index.tick(self.now))

    @precondition(lambda self: self.tiers)
    @rule(pick=PICK, about=CHAINS, how=st.sampled_from(["corrupt", "vanish", "evict", "scan", "foreign"]))
    def tier_changes(self, pick: int, about: Chain, how: str) -> None:
        tier, rank = pick % len(self.tiers), self.ranks[pick // 7 % len(self.ranks)]
        name = name_at(about, pick // 11 % len(self.groups), pick // 13 % len(about.digests))
        held = rank.tiers[tier]
        version = self.versions.get(about.namespace, 0)
        if how == "foreign":
            for other in self.ranks:
                other.tiers[tier][name] = Content(name, other.rank, version)
        elif how == "corrupt" and name in held:
            held[name] = None
        elif how in ("vanish", "evict"):
            held.pop(name, None)
            if how == "evict":
                self.index.announce(tier, rank.rank, [name], False, self.now)
        elif how == "scan":
            current = [n for n, content in held.items() if content and content.version >= version]
            self.index.announce(tier, rank.rank, [n for n in current if n.namespace == about.namespace], True, self.now)

    @rule(pick=PICK)
    def die(self, pick: int) -> None:
        self.ranks[pick % len(self.ranks)].die()
        self.probes = {}
        self.hits = {}
        self.ended(self.index.reset(self.now))


class IndexMachineTests(IndexFactory):
    """Random histories of the index that a subclass opens."""

    machine_examples: int = 100
    """Number of histories."""

    @level(Level.FAULTS)
    def test_any_history_of_an_index_keeps_its_promises(self) -> None:
        run_machine(lambda: IndexMachine(self.open_index), examples=self.machine_examples, steps=50)
