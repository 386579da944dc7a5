"""Values that the index takes and returns."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from lmcache.plan import JobKind, Status

Owner = Hashable
"""A request id. Leases, probes and failed loads are remembered per owner."""


class StopReason(StrEnum):
    """Why a hit ends. Compares equal to its text; `metric` is its label in `lmcache_miss_tokens_total`."""

    metric: str

    def __new__(cls, text: str, metric: str) -> StopReason:
        """Creates a member from its text and metric label."""
        member = str.__new__(cls, text)
        member._value_ = text
        member.metric = metric
        return member

    END = "end", "tail"
    """All of the requested tokens are a hit."""
    TAIL = "tail", "tail"
    """Every full chunk is a hit; the rest is shorter than a chunk."""
    MAX_TOKENS = "max_tokens", "tail"
    """The next chunk boundary lies beyond `max_tokens`."""
    ABSENT = "absent", "absent"
    """No tier has the next object: it was never stored under this name (other tokens, another salt), or long ago."""
    EVICTED = "evicted", "evicted"
    """The next object was evicted."""
    CORRUPT = "corrupt", "corrupt"
    """A tier returned wrong bytes for the next object."""
    FAILED = "failed", "failed"
    """Storing or reading the next object failed."""
    WRITING = "writing", "pending"
    """The next object is being stored; not all ranks have acknowledged it yet."""
    LATE = "late", "failed"
    """The probe of a shared tier timed out."""
    FAILED_BEFORE = "failed_before", "failed"
    """An earlier load of this owner failed; it gets no hit again until `Index.forget`."""
    PROBING = "probing", "pending"
    """A shared tier is being probed (status `pending`)."""
    NO_ROOM = "no_room", "room"
    """A tier has the next object, and DRAM has no room to load it through (engines that load from DRAM only)."""
    GROUP = "group", "group"
    """A layer group's rule allows no later boundary; `Lookup.group` names it."""


class TierInfo(NamedTuple):
    """Facts about a tier that the control plane uses.

    Attributes:
        name: as in `by_tier`.
        shared: whether other processes may add objects, so that it has to be probed.
        usable_bytes: its capacity; None: no limit.
    """

    name: str
    shared: bool = False
    usable_bytes: int | None = None


class Lookup(NamedTuple):
    """The result of a lookup: the longest hit.

    Attributes:
        status: `pending`: a shared tier is being probed, look up again later.
        tokens: length of the hit, a multiple of `chunk_tokens`.
        by_tier: tokens per source, "dram" or a tier's name.
        stop: why the hit ends.
        group: the layer group that ends it, for `StopReason.GROUP`.
    """

    status: Literal["hit", "miss", "pending"]
    tokens: int
    by_tier: dict[str, int]
    stop: StopReason
    group: str = ""


class Store(NamedTuple):
    """The result of beginning a store.

    Attributes:
        job: job id, None if there is nothing to copy.
        accepted: tokens of the chunks of which at least one object is being copied.
        skipped: number of objects not copied, by reason: `present` (already in DRAM), `resident` (not all of it is in engine
            memory), `parent` (the chunk before it is not cached, so no lookup could find it), `full` (no slot can be freed).
    """

    job: int | None
    accepted: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class FlushResult:
    """What became of the objects stored since the last flush. True only if all of them are on every tier.

    Attributes:
        written: objects written to a tier.
        present: objects that a tier held already.
        dropped: objects that are not on a tier, by reason: `refused` (by admission), `skipped` (the write-back queue was full, or
            the object had left DRAM), `full`, `failed`, `late`, `cancelled` (another process has cleared the tier since),
            `pending` (jobs still under way when the time was over), `forgotten` (more were dropped than are remembered),
            `flush` (tiers that could not flush).
    """

    written: int = 0
    present: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.dropped


class Finished(NamedTuple):
    """A job that ended.

    Attributes:
        ok_tokens: load: leading tokens of the request (those skipped included) that are usable on every rank and for every
            group; store, prefetch: tokens of the chunks of which an object was copied.
        statuses: per op, the first status that was not OK on any rank, else OK.
        final: the job no longer touches memory, on any rank. A load that is late is returned twice: first with
            `final=False` (the request may continue, but must not reuse the memory), and again when it is final.
    """

    job: int
    kind: JobKind
    owner: Owner | None
    ok_tokens: int
    statuses: tuple[Status, ...]
    final: bool
