"""What the parts of the index share: the arenas, what the tiers hold, the jobs, and whose load failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from lmcache.eviction import PolicyFactory
from lmcache.index.jobs import Jobs, Work
from lmcache.index.known import Known
from lmcache.index.messages import Owner, TierInfo
from lmcache.index.pool import READY, Entry, Pool
from lmcache.plan import Copy, Delete, Name, Slot, Tier
from lmcache.spec import HitRule

Source = Entry | int
"""Where an object can be had: a ready object in DRAM, or the index of a tier."""

Admit = Callable[[int, Name], bool]
"""Whether an object that became ready in DRAM should be written to a tier."""

SPILL_BATCH = 16
"""Objects per spill job. Its slots are freed together, when the last of them is written."""


class State:
    """See the module."""

    def __init__(
        self,
        groups: Sequence[tuple[str, HitRule]],
        chunk_tokens: int,
        slots: Sequence[int],
        ranks: int,
        tiers: Sequence[TierInfo],
        policy: PolicyFactory,
        admit: Admit | None,
    ) -> None:
        self.names = [name for name, _ in groups]
        self.rules = [rule for _, rule in groups]
        self.chunk_tokens = chunk_tokens
        self.tiers = list(tiers)
        self.pools = [
            Pool(count, policy(count), chained=rule.kind == "all")
            for count, rule in zip(slots, self.rules, strict=True)
        ]
        self.known = [Known(ranks) for _ in tiers]
        self.jobs = Jobs(ranks)
        self.failed: set[Owner] = set()
        self.loading: dict[Owner, set[int]] = {}  # load jobs whose failure counts against their owner
        self.counts: Counter[str] = Counter()
        self.deleting: Counter[tuple[int, Name]] = Counter()  # (tier, object) of removals that have not ended
        self._admit = admit

    def name(self, namespace: bytes, digest: bytes, group: int, depth: int) -> Name:
        """The full name of a full chunk's object."""
        return Name(namespace, digest, group, self.chunk_tokens, depth)

    def name_of(self, group: int, entry: Entry) -> Name:
        """The full name of an object in DRAM."""
        return self.name(entry.space.namespace, entry.digest, group, entry.depth)

    def source(self, namespace: bytes, digest: bytes, group: int) -> Source | None:
        """The nearest place from which every rank can load the object."""
        entry = self.pools[group].find(namespace, digest)
        if entry is not None and entry.state == READY:
            return entry
        return self.tier_with(namespace, digest, group)

    def tier_with(self, namespace: bytes, digest: bytes, group: int) -> int | None:
        """The nearest tier that is known to hold the object on every rank."""
        return next((t for t, known in enumerate(self.known) if known.has(namespace, group, digest)), None)

    def spill(self, namespace: bytes, group: int, run: Sequence[Entry], tiers: Sequence[int]) -> None:
        """Queue write-behind of ready objects to those of `tiers` that are not known to hold them.

        An object whose damaged copy is being removed waits for that: see `deleted`.
        """
        for t in tiers:
            names = self.spillable(namespace, group, run, t)
            for at in range(0, len(names), SPILL_BATCH):
                batch = names[at : at + SPILL_BATCH]
                work = Work("spill", None, namespace)
                work.ops.extend(Copy(name, Slot(entry.slot, entry.generation), Tier(t)) for entry, name in batch)
                entries = [entry for entry, _ in batch]
                self.pools[group].pin(entries)
                work.pins.append((self.pools[group], entries))
                self.jobs.start(work)

    def spillable(self, namespace: bytes, group: int, run: Sequence[Entry], t: int) -> list[tuple[Entry, Name]]:
        """Those of `run` that tier `t` should hold and does not."""
        wanted = [
            (entry, name)
            for entry in run
            if not self.known[t].has(namespace, group, entry.digest)
            and (name := self.name_of(group, entry))
            and (not self.deleting or not self.deleting[t, name])
        ]
        if self._admit is None:
            return wanted
        admitted = [(entry, name) for entry, name in wanted if self._admit(t, name)]
        self.counts["refused"] += len(wanted) - len(admitted)
        return admitted

    def load_ended(self, owner: Owner, job: int, failed: bool) -> None:
        """A failed load bars its owner from further hits, unless the owner was forgotten in the meantime."""
        jobs = self.loading.get(owner)
        if jobs is None or job not in jobs:
            return
        jobs.remove(job)
        if not jobs:
            del self.loading[owner]
        if failed:
            self.failed.add(owner)

    def delete(self, tier: int, names: Sequence[Name]) -> None:
        """Queue the removal of objects from a tier."""
        work = Work("delete", None, names[0].namespace)
        work.ops.extend(Delete(name, tier) for name in names)
        self.deleting.update((tier, name) for name in names)
        self.jobs.start(work)

    def deleted(self, tier: int, name: Name) -> None:
        """A removal has ended on every rank. A good copy that became ready meanwhile may be written now, not before: the
        write would have met the damaged one and kept it, and the removal would have followed."""
        self.deleting[tier, name] -= 1
        if self.deleting[tier, name] > 0:
            return
        del self.deleting[tier, name]
        self.known[tier].remove(name, None)
        entry = self.pools[name.group].find(name.namespace, name.chain)
        if entry is not None and entry.state == READY:
            self.spill(name.namespace, name.group, [entry], [tier])
