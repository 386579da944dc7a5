"""What the parts of the index share: the arenas, what the tiers hold, the jobs, and whose load failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from lmcache.control.eviction import PolicyFactory
from lmcache.control.extents import Extent
from lmcache.control.jobs import JobTable, TrackedJob
from lmcache.control.outcomes import Owner, TierInfo
from lmcache.control.slot_pool import SlotPool
from lmcache.control.tier_directory import TierDirectory
from lmcache.plan import ArenaSlot, Copy, Delete, Name, Tier
from lmcache.spec import HitRule

DRAM = -1
"""The place nearer than the first tier, where places are numbered."""

Admit = Callable[[int, Name], bool]
"""Whether an object that became ready in DRAM should be written to a tier."""

WRITE_BACK_BATCH = 16
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
            SlotPool(count, policy(count), chained=rule.kind == "all")
            for count, rule in zip(slots, self.rules, strict=True)
        ]
        self.directories = [TierDirectory(ranks) for _ in tiers]
        self.jobs = JobTable(ranks)
        self.failed: set[Owner] = set()
        self.loading: dict[Owner, set[int]] = {}  # load jobs whose failure counts against their owner
        self.counts: Counter[str] = Counter()
        self.deleting: Counter[tuple[int, Name]] = Counter()  # (tier, object) of removals that have not ended
        self._admit = admit

    @property
    def version(self) -> int:
        """Grows whenever the contents of an arena or of a tier directory change: a lookup of equal version finds the same."""
        version = 0
        for pool in self.pools:
            version += pool.changes
        for directory in self.directories:
            version += directory.changes
        return version

    def name(self, namespace: bytes, digest: bytes, group: int, depth: int) -> Name:
        """The full name of a full chunk's object."""
        return Name(namespace, digest, group, self.chunk_tokens, depth)

    def source(self, namespace: bytes, digest: bytes, group: int, depth: int) -> int | None:
        """The nearest place from which every rank can load the object: `DRAM` or the index of a tier."""
        found = self.pools[group].find(namespace, digest, depth)
        if found is not None and found.ready:
            return DRAM
        return self.tier_with(namespace, digest, group)

    def tier_with(self, namespace: bytes, digest: bytes, group: int) -> int | None:
        """The nearest tier that is known to hold the object on every rank."""
        return next((t for t, known in enumerate(self.directories) if known.has(namespace, group, digest)), None)

    def write_back(self, namespace: bytes, group: int, extents: Sequence[Extent], tiers: Sequence[int]) -> None:
        """Queue write-behind of ready objects to those of `tiers` that are not known to hold them.

        An object whose damaged copy is being removed waits for that: see `deleted`.
        """
        pool = self.pools[group]
        for t in tiers:
            objects = self.to_write_back(namespace, group, extents, t)
            for first in range(0, len(objects), WRITE_BACK_BATCH):
                batch = objects[first : first + WRITE_BACK_BATCH]
                work = TrackedJob("write_back", None, namespace)
                work.ops.extend(Copy(name, slot, Tier(t)) for _, name, slot in batch)
                work.pins.append((pool, pool.pin(list(dict.fromkeys(extent for extent, _, _ in batch)))))
                self.jobs.start(work)

    def to_write_back(
        self, namespace: bytes, group: int, extents: Sequence[Extent], t: int
    ) -> list[tuple[Extent, Name, ArenaSlot]]:
        """Those objects of `extents` that tier `t` should hold and does not."""
        wanted = [
            (extent, name, ArenaSlot(slot, generation))
            for extent in extents
            for digest, slot, generation, depth in extent.objects()
            if not self.directories[t].has(namespace, group, digest)
            and (name := self.name(namespace, digest, group, depth))
            and (not self.deleting or not self.deleting[t, name])
        ]
        if self._admit is None:
            return wanted
        admitted = [found for found in wanted if self._admit(t, found[1])]
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
        work = TrackedJob("delete", None, names[0].namespace)
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
        self.directories[tier].remove(name, None)
        pool = self.pools[name.group]
        found = pool.find(name.namespace, name.chain, name.depth)
        if found is not None and found.ready:
            self.write_back(name.namespace, name.group, pool.carve([found.part]), [tier])
