"""The state that the parts of the index share: arenas, tier directories, jobs, and owners whose load failed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

from lmcache.control.eviction import PolicyFactory
from lmcache.control.extents import Extent
from lmcache.control.jobs import JobTable, TrackedJob
from lmcache.control.outcomes import Owner, TierInfo
from lmcache.control.slot_pool import SlotPool
from lmcache.control.tier_directory import TierDirectory
from lmcache.plan import ArenaSlot, Copy, Delete, Name, Tier
from lmcache.spec import HitRule

DRAM = -1
"""The number of DRAM where places are numbered: one below the nearest tier, which is 0."""

Admit = Callable[[int, Name], bool]
"""(tier, object) → whether an object that became ready in DRAM should be written to a tier."""

_UNWRITTEN = 65_536
"""Unwritten objects remembered at most."""

WRITE_BACK_BATCH = 16
"""Objects per write-back job. Its slots stay pinned until the last of them is written."""


class State:
    """See the module.

    Attributes:
        names, rules: of each group.
        pools: the arena of each group.
        directories: what each tier holds.
        failed: owners that get no hit because a load of theirs failed.
        loading: owner → load jobs whose failure counts against it.
        counts: events since the start, see `Index.stats`.
        deleting: (tier, object) → deletes that have not ended.
    """

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
        self.loading: dict[Owner, set[int]] = {}
        self.counts: Counter[str] = Counter()
        self.unwritten: OrderedDict[tuple[int, Name], str] = (
            OrderedDict()
        )  # (tier, object) whose write-back failed → why
        self.deleting: Counter[tuple[int, Name]] = Counter()
        self._admit = admit

    @property
    def version(self) -> int:
        """Grows with every change of an arena or a tier directory: at the same version, a lookup finds the same hit."""
        version = 0
        for pool in self.pools:
            version += pool.changes
        for directory in self.directories:
            version += directory.changes
        return version

    def name(self, namespace: bytes, digest: bytes, group: int, depth: int) -> Name:
        """Returns the name of a chunk's object in a group."""
        return Name(namespace, digest, group, self.chunk_tokens, depth)

    def source(self, namespace: bytes, digest: bytes, group: int, depth: int) -> int | None:
        """Returns the nearest place from which every rank can load the object, `DRAM` or the index of a tier; None: nowhere."""
        found = self.pools[group].find(namespace, digest, depth)
        if found is not None and found.ready:
            return DRAM
        return self.tier_with(namespace, digest, group)

    def tier_with(self, namespace: bytes, digest: bytes, group: int) -> int | None:
        """Returns the nearest tier that has the object on every rank, according to its directory."""
        return next(
            (t for t, directory in enumerate(self.directories) if directory.has(namespace, group, digest)), None
        )

    def write_back(self, namespace: bytes, group: int, extents: Sequence[Extent], tiers: Sequence[int]) -> None:
        """Queues write-back of ready objects to those of `tiers` that do not have them yet.

        An object whose corrupt copy is being deleted is written after the delete, see `deleted`.
        """
        pool = self.pools[group]
        for t in tiers:
            objects = self.to_write_back(namespace, group, extents, t)
            for first in range(0, len(objects), WRITE_BACK_BATCH):
                batch = objects[first : first + WRITE_BACK_BATCH]
                job = TrackedJob("write_back", None, namespace)
                job.ops.extend(Copy(name, slot, Tier(t)) for _, name, slot in batch)
                job.pins.append((pool, pool.pin(list(dict.fromkeys(extent for extent, _, _ in batch)))))
                self.jobs.start(job)

    def to_write_back(
        self, namespace: bytes, group: int, extents: Sequence[Extent], t: int
    ) -> list[tuple[Extent, Name, ArenaSlot]]:
        """Returns the objects of `extents` that tier `t` does not have and `admit` admits."""
        directory, shared, admit = self.directories[t], self.tiers[t].shared, self._admit
        wanted = []
        for extent in extents:
            for digest, slot, generation, depth in extent.objects():
                known = directory.has(namespace, group, digest)
                if known and not shared:
                    continue
                name = self.name(namespace, digest, group, depth)
                if self.deleting and self.deleting[t, name]:
                    continue
                # What a shared tier is believed to have may have left it: the rank asks it before it skips the write.
                if admit is None or admit(t, name):
                    wanted.append((extent, name, ArenaSlot(slot, generation)))
                elif not known:
                    self.counts["refused"] += 1
                    self.not_written(t, name, "refused")
        return wanted

    def not_written(self, tier: int, name: Name, reason: str) -> None:
        """Remembers that an object did not reach a tier, and why."""
        self.unwritten[tier, name] = reason
        if len(self.unwritten) > _UNWRITTEN:
            self.unwritten.popitem(last=False)
            self.counts["unwritten_forgotten"] += 1

    def may_be_written(self, name: Name, reason: str) -> bool:
        """Whether an object that was not written for `reason` can be written now: in DRAM, and not refused by admission."""
        found = self.pools[name.group].find(name.namespace, name.chain, name.depth)
        return reason != "refused" and found is not None and found.ready

    def retry_unwritten(self) -> int:
        """Queues another write-back of each unwritten object that is still in DRAM and was not refused; returns how many."""
        retried = 0
        for (tier, name), reason in list(self.unwritten.items()):
            found = self.pools[name.group].find(name.namespace, name.chain, name.depth)
            if found is not None and self.may_be_written(name, reason):
                self.write_back(name.namespace, name.group, self.pools[name.group].carve([found.part]), [tier])
                retried += 1
        return retried

    def retry_oldest(self, limit: int) -> int:
        """Queues another write-back of the `limit` objects that have been unwritten longest; returns how many.

        For callers that never ask what became of write-backs: those that cannot be written any more are forgotten.
        """
        retried = 0
        for tier, name in list(islice(self.unwritten, limit)):
            reason = self.unwritten.pop((tier, name))
            found = self.pools[name.group].find(name.namespace, name.chain, name.depth)
            if found is not None and self.may_be_written(name, reason):
                self.write_back(name.namespace, name.group, self.pools[name.group].carve([found.part]), [tier])
                retried += 1
        return retried

    def load_ended(self, owner: Owner, job: int, failed: bool) -> None:
        """Ends a load. After a failed one, its owner gets no more hits, unless the owner was forgotten meanwhile."""
        jobs = self.loading.get(owner)
        if jobs is None or job not in jobs:
            return
        jobs.remove(job)
        if not jobs:
            del self.loading[owner]
        if failed:
            self.failed.add(owner)

    def delete(self, tier: int, names: Sequence[Name]) -> None:
        """Queues the deletion of objects from a tier."""
        job = TrackedJob("delete", None, names[0].namespace)
        job.ops.extend(Delete(name, tier) for name in names)
        self.deleting.update((tier, name) for name in names)
        self.jobs.start(job)

    def deleted(self, tier: int, name: Name) -> None:
        """Ends a delete on every rank, and queues write-back of a good copy that became ready meanwhile.

        Not earlier: a write keeps an object that is already there, so the corrupt copy would have stayed until deleted, and
        the tier would have neither.
        """
        self.deleting[tier, name] -= 1
        if self.deleting[tier, name] > 0:
            return
        del self.deleting[tier, name]
        self.directories[tier].remove(name, None)
        pool = self.pools[name.group]
        found = pool.find(name.namespace, name.chain, name.depth)
        if found is not None and found.ready:
            self.write_back(name.namespace, name.group, pool.carve([found.part]), [tier])
