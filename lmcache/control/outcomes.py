"""What the index answers: plain values."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, NamedTuple

from lmcache.plan import JobKind, Status

Owner = Hashable
"""Whoever asks: a request id. Leases, probes and the memory of a failed load are kept under it."""

END = "end"
"""Everything that was asked for is a hit."""
TAIL = "tail"
"""Every full chunk is a hit; what is left is shorter than a chunk."""
MAX_TOKENS = "max_tokens"
"""The next boundary lies beyond `max_tokens`."""
ABSENT = "absent"
"""The next object is nowhere, and nothing is remembered about it: never stored under this name (other tokens or salt)."""
EVICTED = "evicted"
"""It was here and had to make room."""
CORRUPT = "corrupt"
"""A tier held bytes that were not this object."""
FAILED = "failed"
"""Storing or reading it failed."""
WRITING = "writing"
"""It is being stored, and not all ranks have acknowledged it yet."""
LATE = "late"
"""A shared tier did not answer the probe in time."""
FAILED_BEFORE = "failed_before"
"""An earlier load of this owner failed; it is not offered anything again until `forget`."""
PROBING = "probing"
"""The answer of a shared tier is awaited (status `pending`)."""
GROUP = "group:"
"""Prefix: the named group's rule allows no later boundary."""


class TierInfo(NamedTuple):
    """What the index knows of a tier: its name in `by_tier`, and whether other processes may add objects to it."""

    name: str
    shared: bool = False


class Lookup(NamedTuple):
    """The longest hit. `by_tier`: tokens per source ("dram" or a tier's name); `stop`: why it ends there (see above)."""

    status: Literal["hit", "miss", "pending"]
    tokens: int
    by_tier: dict[str, int]
    stop: str


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
