"""What the index returns: plain values."""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from typing import Literal, NamedTuple

from lmcache.plan import JobKind, Status

Owner = Hashable
"""A request id. Leases, probes and failed loads are remembered per owner."""


class StopReason(StrEnum):
    """Why a hit ends where it ends. Compares equal to its text; `metric` is its label in `lmcache_miss_tokens_total`."""

    metric: str

    def __new__(cls, text: str, metric: str) -> StopReason:
        """A member of that text and metric label."""
        member = str.__new__(cls, text)
        member._value_ = text
        member.metric = metric
        return member

    END = "end", "tail"
    """Everything that was asked for is a hit."""
    TAIL = "tail", "tail"
    """Every full chunk is a hit; the rest is shorter than a chunk."""
    MAX_TOKENS = "max_tokens", "tail"
    """The next chunk boundary lies beyond `max_tokens`."""
    ABSENT = "absent", "absent"
    """No tier holds the next object: it was never stored under this name (other tokens, another salt), or long ago."""
    EVICTED = "evicted", "evicted"
    """The next object was evicted."""
    CORRUPT = "corrupt", "corrupt"
    """A tier held other bytes than those of the next object."""
    FAILED = "failed", "failed"
    """Storing or reading the next object failed."""
    WRITING = "writing", "pending"
    """The next object is being stored; not all ranks have acknowledged it yet."""
    LATE = "late", "failed"
    """A shared tier did not answer the probe in time."""
    FAILED_BEFORE = "failed_before", "failed"
    """An earlier load of this owner failed; it gets no hit again until `Index.forget`."""
    PROBING = "probing", "pending"
    """A shared tier has not answered yet (status `pending`)."""
    GROUP = "group", "group"
    """A layer group's rule allows no later boundary; `Lookup.group` names it."""


class TierInfo(NamedTuple):
    """What the control plane knows of a tier.

    Attributes:
        name: as in `by_tier`.
        shared: other processes may add objects, so that it is probed.
        usable_bytes: bytes that it holds before it evicts; None: no limit.
    """

    name: str
    shared: bool = False
    usable_bytes: int | None = None


class Lookup(NamedTuple):
    """The longest hit.

    Attributes:
        status: `pending`: a shared tier is being probed, look up again later.
        tokens: length of the hit, a multiple of `chunk_tokens`.
        by_tier: tokens per source, "dram" or a tier's name.
        stop: why the hit ends there.
        group: the layer group that ends it, for `StopReason.GROUP`.
    """

    status: Literal["hit", "miss", "pending"]
    tokens: int
    by_tier: dict[str, int]
    stop: StopReason
    group: str = ""


class Store(NamedTuple):
    """What became of a store.

    Attributes:
        job: job id, None if there is nothing to copy.
        accepted: tokens of the chunks of which something is being copied; what was there before does not count.
        skipped: objects not copied, by reason: `present` (already in DRAM), `resident` (not whole in engine memory),
            `parent` (the chunk before it is nowhere, so nobody could reach it), `full` (no slot can be freed now).
    """

    job: int | None
    accepted: int
    skipped: dict[str, int]


class Finished(NamedTuple):
    """A job ended.

    Attributes:
        ok_tokens: load: tokens usable from the start of the request (what was `skip`ped included), on every rank and
            for every group; store, prefetch: tokens of the objects copied, one group's worth each.
        statuses: per op, the first status that was not OK on any rank, else OK.
        final: nothing of the job touches memory any more, on any rank. A load that is late is told twice: at first with
            `final=False` (the engine may go on elsewhere, but not reuse this memory), and again when it is final.
    """

    job: int
    kind: JobKind
    owner: Owner | None
    ok_tokens: int
    statuses: tuple[Status, ...]
    final: bool
