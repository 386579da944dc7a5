"""The index against ranks that fail, hang, die, and whose reports are lost, doubled, late and out of order."""

from __future__ import annotations

from itertools import chain as flatten

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache.eviction import POLICIES
from lmcache.index import Finished, Index, TierInfo
from lmcache.index.pool import READY
from lmcache.plan import Chain, Name, Report, Status
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.indexlab import CHUNK, Content, Rank, chain, drain, name_at

GROUPS = [
    [("full", ALL)],
    [("full", ALL), ("sliding", trailing(5))],
    [("full", ALL), ("mamba", HitRule("state_at")), ("cross", HitRule("whole"))],
    [("a", ALL), ("b", ALL)],
    [("sliding", trailing(8))],
    [("mamba", HitRule("state_at")), ("sliding", trailing(5))],
]
TIERS = [[], [TierInfo("disk")], [TierInfo("disk"), TierInfo("redis", shared=True)], [TierInfo("nfs", shared=True)]]
CHAINS = st.builds(chain, st.sampled_from(["one", "two"]), st.sampled_from(["abcd", "abce", "abxyz"]))
OWNERS = st.integers(0, 2)
FAULTS = st.sampled_from(
    [None] * 8 + ["hang", Status.FAILED, Status.FULL, Status.SKIPPED, Status.CORRUPT, Status.MISSING]
)
FATES = st.sampled_from(["deliver", "deliver", "deliver", "twice", "delay", "lose"])
HOLES = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=2)
PICK = st.integers(0, 1_000_000)
PROBE_S, LOAD_S, LEASE_S = 0.5, 5.0, 20.0


def needs(rule: HitRule, n: int) -> set[int]:
    """What a hit of n chunks needs, token by token."""
    tokens = range(n * CHUNK)
    if rule.kind == "all":
        wanted = set(tokens)
    elif rule.kind == "trailing":
        wanted = {t for t in tokens if t >= n * CHUNK - rule.window}
    elif rule.kind == "state_at":
        wanted = {n * CHUNK - 1} if n else set()
    else:
        wanted = {0} if n else set()
    return {t // CHUNK for t in wanted}


class Load:
    """What the model knows of a load."""

    def __init__(self, owner: int | None, about: Chain, skip: int, version: int) -> None:
        self.owner, self.chain, self.skip, self.version = owner, about, skip, version
        self.limit = 0
        self.ended: Finished | None = None


class IndexMachine(RuleBasedStateMachine):
    @initialize(
        groups=st.sampled_from(GROUPS),
        tiers=st.sampled_from(TIERS),
        slots=st.lists(st.integers(0, 5), min_size=3, max_size=3),
        count=st.integers(1, 3),
        policy=st.sampled_from(sorted(POLICIES)),
        warm=st.lists(CHAINS, max_size=3),
    )
    def start(self, groups, tiers, slots, count, policy, warm) -> None:
        self.groups, self.tiers = groups, tiers
        self.index = Index(
            groups,
            CHUNK,
            slots[: len(groups)],
            ranks=count,
            tiers=tiers,
            policy=policy,
            lease_ttl=LEASE_S,
            load_deadline=LOAD_S,
            probe_deadline=PROBE_S,
        )
        self.ranks = [Rank(r, len(tiers)) for r in range(count)]
        self.now = 0.0
        self.network: list[Report] = []
        self.versions: dict[bytes, int] = {}
        self.stored: dict[int, int] = {}
        self.failed: set[int] = set()
        self.last: dict[int, tuple[Chain, int]] = {}
        self.hits: dict[int, tuple[Chain, int]] = {}
        self.leased: dict[int, tuple[float, dict[tuple[int, int], Name]]] = {}  # until when, which slots
        self.loads: dict[int, Load] = {}
        self.questions: dict[int, tuple[tuple[bytes, bytes, int], float]] = {}
        for about in warm:
            self.store(0, about, (0, 0), set())
            self.all_goes_well(2)

    # ------------------------------------------------------------ what an engine does

    @rule(owner=OWNERS, about=CHAINS, tokens=st.integers(0, 24))
    def lookup(self, owner, about, tokens) -> None:
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
            asked = self.asked(owner, about, limit)
            if self.now >= asked + PROBE_S + LEASE_S:  # the memory of a question fades too
                self.questions[owner] = (self.questions[owner][0], asked := self.now)
            assert self.now < asked + PROBE_S, "pending past the deadline"
            return
        if found.tokens < limit * CHUNK and any(tier.shared for tier in self.tiers):
            self.asked(owner, about, limit)
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
    def ask_again(self, owner, salted, load) -> None:
        """A waiting request asks in every step; digests of an engine's own may be equal under another salt."""
        about, tokens = self.last.get(owner, (chain("one", "abcd"), 24))
        if salted:
            about = Chain({b"o": b"two", b"t": b"one"}[about.namespace[:1]].ljust(32, b"."), about.digests)
        self.lookup(owner, about, tokens)
        if load:
            self.load(owner, None, 0)

    def slots_of(self, about: Chain, n: int) -> dict[tuple[int, int], Name]:
        """The slots in which the objects of a hit lie."""
        slots = {}
        for group, (_, r) in enumerate(self.groups):
            for i in needs(r, n):
                entry = self.index.state.pools[group].find(about.namespace, about.digests[i])
                if entry is not None and entry.state == READY:
                    slots[group, entry.slot] = name_at(about, group, i)
        return slots

    def asked(self, owner: int, about: Chain, limit: int) -> float:
        """When this owner first asked this; another question takes its place."""
        key = about.namespace, about.digests[limit - 1], limit
        if self.questions.get(owner, (None, 0.0))[0] != key:
            self.questions[owner] = key, self.now
        return self.questions[owner][1]

    def legal(self, about: Chain, n: int) -> bool:
        named = ((name_at(about, g, i), i) for g, (_, r) in enumerate(self.groups) for i in needs(r, n))
        return all(self.index.where(name) for name, _ in named)

    @rule(owner=OWNERS, tokens=st.none() | st.integers(0, 24), skip=st.sampled_from([0, 0, 0, 3, 4, 9]))
    def load(self, owner, tokens, skip) -> None:
        job = self.index.begin_load(owner, self.now, tokens=tokens, skip=skip)
        about, offered = self.hits.pop(owner, (None, 0))
        if about is None or self.leased[owner][0] <= self.now:
            assert job is None, "loaded without a valid lease"
        elif job is not None:
            self.loads[job] = Load(owner, about, skip, self.versions.get(about.namespace, 0))
            self.loads[job].limit = offered if tokens is None else min(offered, tokens)

    @rule(owner=OWNERS, about=CHAINS, tokens=st.none() | st.integers(0, 24), skip=st.sampled_from([0, 0, 0, 3, 4, 9]))
    def serve(self, owner, about, tokens, skip) -> None:
        """Many engines ask and load in one go."""
        self.lookup(owner, about, 24)
        self.load(owner, tokens, skip)

    @rule(owner=OWNERS, about=CHAINS, ask=st.booleans())
    def prefetch(self, owner, about, ask) -> None:
        if ask:
            self.lookup(owner, about, 24)
        self.index.begin_prefetch(owner, self.now)

    @rule(owner=OWNERS)
    def release(self, owner) -> None:
        self.index.release(owner)
        self.hits.pop(owner, None)

    @rule(owner=OWNERS)
    def forget(self, owner) -> None:
        self.index.forget(owner)
        self.hits.pop(owner, None)
        for load in self.loads.values():
            if load.owner == owner:
                load.owner = None
        self.failed.discard(owner)
        self.questions.pop(owner, None)

    @rule(
        owner=OWNERS,
        about=CHAINS,
        bounds=st.tuples(PICK, PICK),
        holes=HOLES,
    )
    def store(self, owner, about, bounds, holes) -> None:
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
    def clear(self, both, about) -> None:
        self.index.clear(None if both else about.namespace, self.now)
        for space in {b"one".ljust(32, b"."), b"two".ljust(32, b".")} if both else {about.namespace}:
            self.versions[space] = self.versions.get(space, 0) + 1
            self.hits = {o: hit for o, hit in self.hits.items() if hit[0].namespace != space}
            for tier in flatten.from_iterable(rank.tiers for rank in self.ranks):
                for name in [n for n in tier if n.namespace == space]:
                    del tier[name]

    # ------------------------------------------------------------ what the world does

    @rule(picks=st.lists(st.tuples(PICK, FAULTS), max_size=12), fates=st.lists(FATES, min_size=3, max_size=3))
    def turn(self, picks, fates) -> None:
        """One round trip: the plan goes out, some of the ops run, every rank reports, and the network does as it likes."""
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
    def take(self, pick) -> None:
        full = [rank for rank in self.ranks if rank.inbox]
        full[pick % len(full)].take()

    @precondition(lambda self: any(rank.pending() for rank in self.ranks))
    @rule(pick=PICK, fault=FAULTS)
    def step(self, pick, fault) -> None:
        todo = [(rank, run, i) for rank in self.ranks for run, i in rank.pending()]
        rank, run, i = todo[pick % len(todo)]
        rank.step(run, i, fault)

    @precondition(lambda self: any(rank.runs for rank in self.ranks))
    @rule(pick=PICK)
    def expire(self, pick) -> None:
        todo = [(rank, run) for rank in self.ranks for run in rank.runs.values() if not run.late]
        if todo:
            rank, run = todo[pick % len(todo)]
            rank.expire(run)

    @rule(pick=PICK)
    def send(self, pick) -> None:
        self.network.append(self.ranks[pick % len(self.ranks)].report())

    @precondition(lambda self: self.network)
    @rule(pick=PICK, twice=st.booleans())
    def deliver(self, pick, twice) -> None:
        report = self.network[pick % len(self.network)]
        if not twice:
            self.network.remove(report)
        self.ended(self.index.report(report, self.now))

    @precondition(lambda self: self.network)
    @rule(pick=PICK)
    def lose(self, pick) -> None:
        self.network.pop(pick % len(self.network))

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds) -> None:
        for _ in range(rounds):
            self.plan()
            for report in drain(self.ranks):
                self.ended(self.index.report(report, self.now))

    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0, 7.0, 25.0]))
    def tick(self, seconds) -> None:
        self.now += seconds
        self.ended(self.index.tick(self.now))

    @precondition(lambda self: self.tiers)
    @rule(pick=PICK, about=CHAINS, how=st.sampled_from(["corrupt", "vanish", "evict", "scan", "foreign"]))
    def tier_changes(self, pick, about, how) -> None:
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
    def die(self, pick) -> None:
        self.ranks[pick % len(self.ranks)].die()
        self.questions = {}
        self.hits = {}
        self.ended(self.index.reset(self.now))

    # ------------------------------------------------------------ what must hold

    def ended(self, finished: list[Finished]) -> None:
        for end in finished:
            if end.kind != "load":
                continue
            load = self.loads[end.job]
            if load.ended is not None:
                assert not load.ended.final, "told twice"
                assert end.final
                assert end.ok_tokens == load.ended.ok_tokens
            load.ended = end
            if load.owner is not None and any(status is not Status.OK for status in end.statuses):
                self.failed.add(load.owner)
                self.hits.pop(load.owner, None)
            if end.ok_tokens > load.skip:
                self.loaded_right(end, load)

    def loaded_right(self, end: Finished, load: Load) -> None:
        assert end.ok_tokens % CHUNK == 0
        assert end.ok_tokens <= load.limit
        for group, (_, r) in enumerate(self.groups):
            for i in needs(r, end.ok_tokens // CHUNK) - set(range(load.skip // CHUNK)):
                for rank in self.ranks:
                    content = rank.engine[end.job][group, i * CHUNK]
                    assert content[:2] == (name_at(load.chain, group, i), rank.rank)
                    assert content.version >= load.version, "served after it was cleared"

    @invariant()
    def sound(self) -> None:
        self.index.check()
        held = {
            (group, entry.slot): name_at(Chain(entry.space.namespace, {entry.depth: entry.digest}), group, entry.depth)
            for group, pool in enumerate(self.index.state.pools)
            for entry in pool.residents()
        }
        for owner, (until, slots) in self.leased.items():
            if owner in self.hits and self.now < until:
                for slot, name in slots.items():
                    assert held.get(slot, name) == name, (
                        f"slot {slot}, leased to owner {owner}, was given to another object"
                    )
        for group, pool in enumerate(self.index.state.pools):
            for entry in pool.residents():
                if entry.state == READY:
                    for rank in self.ranks:
                        content = rank.arena.get((group, entry.slot))
                        assert content is not None, (
                            f"slot {entry.slot} is ready, but rank {rank.rank} has nothing there"
                        )
                        assert content.name.chain == entry.digest
                        assert content.name.namespace == entry.space.namespace

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for _ in range(30):
            plan = self.index.take_plan()
            for rank in self.ranks:
                rank.inbox.append((plan, self.stored))
            for report in drain(self.ranks):
                self.ended(self.index.report(report, self.now))
        for owner in range(5):
            self.index.forget(owner)
        self.index.check()
        stats = self.index.stats()
        assert stats["jobs"] == stats["leases"] == stats["slots_leaving"] == stats["failed_owners"] == 0
        for pool in self.index.state.pools:
            assert all(entry.state == READY and entry.refs == 0 for entry in pool.residents())
        unfinished = [job for job, load in self.loads.items() if load.ended is None or not load.ended.final]
        assert not unfinished, f"loads {unfinished} never ended"


IndexMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestIndexMachine = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")(
    IndexMachine.TestCase
)
