"""A model of an index: what was stored, offered, leased, loaded and cleared, and the invariants of every history.

`index_machine` generates the histories. Hit rules are computed here token by token, as an independent reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis.stateful import RuleBasedStateMachine, invariant

from lmcache.control import Finished, Index, TierInfo
from lmcache.plan import Chain, Name, Report, Status
from lmcache.spec import HitRule
from lmcache_conformance.labs.indexlab import CHUNK, Rank, drain, name_at

PROBE_S, LOAD_S, LEASE_S = 0.5, 5.0, 20.0

Groups = Sequence[tuple[str, HitRule]]


def needs(rule: HitRule, n: int) -> set[int]:
    """Returns the chunks that a hit of n chunks needs, computed token by token."""
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


@dataclass
class Load:
    """A load that has begun.

    Attributes:
        owner: the request that waits for it; None once the request was forgotten.
        skip: leading tokens that the engine has itself.
        limit: the end of what it was offered and requested, in tokens.
        version: how often its namespace had been cleared when it began.
        ended: how it ended; None while it runs.
    """

    owner: int | None
    chain: Chain
    skip: int
    limit: int
    version: int
    ended: Finished | None = None


class IndexModel(RuleBasedStateMachine):
    """An index, its ranks, and the model of them.

    Args:
        open_index: opens the index, see `index_factory.IndexFactory`.
    """

    index: Index

    def __init__(self, open_index: Callable[..., Index]) -> None:
        super().__init__()
        self.open_index = open_index

    def begin(self, groups: Groups, tiers: Sequence[TierInfo], slots: Sequence[int], count: int, policy: str) -> None:
        """Opens an empty index with `count` ranks."""
        self.groups, self.tiers = groups, tiers
        self.index = self.open_index(
            groups,
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
        self.leased: dict[int, tuple[float, dict[tuple[int, int], Name]]] = {}  # owner → (expiry, slots of the hit)
        self.loads: dict[int, Load] = {}
        self.probes: dict[int, tuple[tuple[bytes, bytes, int], float]] = {}

    # ------------------------------------------------------------ what may be offered

    def slots_of(self, about: Chain, n: int) -> dict[tuple[int, int], Name]:
        """Returns the slots that hold the objects of a hit."""
        slots = {}
        for group, (_, r) in enumerate(self.groups):
            for i in needs(r, n):
                found = self.index.state.pools[group].find(about.namespace, about.digests[i])
                if found is not None and found.ready:
                    slots[group, found.slot] = name_at(about, group, i)
        return slots

    def probed(self, owner: int, about: Chain, limit: int) -> float:
        """Returns when this owner first looked this up, which begins its probe; another lookup replaces it."""
        key = about.namespace, about.digests[limit - 1], limit
        if self.probes.get(owner, (None, 0.0))[0] != key:
            self.probes[owner] = key, self.now
        return self.probes[owner][1]

    def legal(self, about: Chain, n: int) -> bool:
        """Returns whether everything that a hit of n chunks needs is in DRAM or a tier."""
        named = ((name_at(about, g, i), i) for g, (_, r) in enumerate(self.groups) for i in needs(r, n))
        return all(self.index.where(name) for name, _ in named)

    # ------------------------------------------------------------ what must hold

    def ended(self, finished: list[Finished]) -> None:
        """Records and checks what the index reports as ended."""
        for end in finished:
            if end.kind != "load":
                continue
            load = self.loads[end.job]
            if load.ended is not None:
                assert not load.ended.final, "a load ends finally twice"
                assert end.final
                assert end.ok_tokens == load.ended.ok_tokens
            load.ended = end
            if load.owner is not None and any(status is not Status.OK for status in end.statuses):
                self.failed.add(load.owner)
                self.hits.pop(load.owner, None)
            if end.ok_tokens > load.skip:
                self.loaded_right(end, load)

    def loaded_right(self, end: Finished, load: Load) -> None:
        """Asserts that what is reported as loaded is in engine memory, on every rank."""
        assert end.ok_tokens % CHUNK == 0
        assert end.ok_tokens <= load.limit
        for group, (_, r) in enumerate(self.groups):
            for i in needs(r, end.ok_tokens // CHUNK) - set(range(load.skip // CHUNK)):
                for rank in self.ranks:
                    content = rank.engine.get(end.job, {}).get((group, i * CHUNK))
                    assert content is not None, (
                        f"chunk {i} of group {group} is reported as loaded, but rank {rank.rank} lacks it"
                    )
                    assert content[:2] == (name_at(load.chain, group, i), rank.rank)
                    assert content.version >= load.version, "served after it was cleared"

    @invariant()
    def sound(self) -> None:
        self.index.check()
        held = {
            (group, held.slot): Name(held.namespace, held.digest, group, CHUNK, held.depth)
            for group, pool in enumerate(self.index.state.pools)
            for held in pool.residents()
        }
        for owner, (until, slots) in self.leased.items():
            if owner in self.hits and self.now < until:
                for slot, name in slots.items():
                    assert held.get(slot, name) == name, (
                        f"slot {slot}, leased to owner {owner}, was reused for another object"
                    )
        for group, pool in enumerate(self.index.state.pools):
            for found in pool.residents():
                if found.ready:
                    for rank in self.ranks:
                        content = rank.arena.get((group, found.slot))
                        assert content is not None, f"slot {found.slot} is ready, but empty on rank {rank.rank}"
                        assert content.name.chain == found.digest
                        assert content.name.namespace == found.namespace

    def teardown(self) -> None:
        """Ends all requests and delivers all reports; asserts that nothing is held."""
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
            assert all(found.ready and found.extent.refs == 0 for found in pool.residents())
        unfinished = [job for job, load in self.loads.items() if load.ended is None or not load.ended.final]
        assert not unfinished, f"loads {unfinished} never ended"
