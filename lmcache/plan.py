"""The messages between control plane and data plane: plain data, serialisable with msgspec, no behaviour.

The index (one per engine scheduler) emits a `Plan`; every rank's transfer executes the same plan and answers with
`Report`s. A report is *cumulative*: it repeats every job report that no plan has acknowledged yet, so a lost, doubled or
reordered report is harmless. Each op is one hop between two places; ops of one arena slot run in plan order, so
"disk → slot 7" followed by "slot 7 → engine" needs no further dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec

from lmcache.moved import renamed


class Name(NamedTuple):
    """An object without its rank: what the index knows. A rank adds its rect and gets an `ObjectId`."""

    namespace: bytes
    chain: bytes
    group: int
    tokens: int
    depth: int


class Chain(NamedTuple):
    """A sequence of objects as the index sees it: by default a token sequence, one 32-byte digest per full chunk.

    Attributes:
        namespace: what decides the values beside the tokens.
        digests: names, in order.
        linked: each digest covers everything before it, so that an object is of no use without those before. False for
            names that an engine brought along and that mean something each on their own; they have depth 0 and no parent.
    """

    namespace: bytes
    digests: Sequence[bytes]
    linked: bool = True

    def depth(self, position: int) -> int:
        """The depth in the object's name."""
        return position if self.linked else 0

    def parent(self, position: int) -> bytes | None:
        """The digest without which this one is of no use."""
        return self.digests[position - 1] if self.linked and position else None


class Engine(msgspec.Struct, frozen=True, tag="engine", array_like=True):
    """The engine's own KV memory, at the slots passed along with the plan for this job."""


class ArenaSlot(msgspec.Struct, frozen=True, tag="slot", array_like=True):
    """An arena slot of the object's group. `generation` grows each time the index assigns the slot anew."""

    index: int
    generation: int


class Tier(msgspec.Struct, frozen=True, tag="tier", array_like=True):
    """A tier below the arena, by its position in the configured list (0 = nearest)."""

    index: int


Place = Engine | ArenaSlot | Tier


class Copy(msgspec.Struct, frozen=True, tag="copy", array_like=True):
    """Move one object one hop. `start` is the offset of its first token in the job's engine slots (Engine places only)."""

    name: Name
    src: Place
    dst: Place
    start: int = 0


class Probe(msgspec.Struct, frozen=True, tag="probe", array_like=True):
    """Does this tier hold the object? `OK` = yes, `MISSING` = no."""

    name: Name
    tier: int


class Delete(msgspec.Struct, frozen=True, tag="delete", array_like=True):
    """Remove the object from a tier; removing what is not there is `OK`."""

    name: Name
    tier: int


Op = Copy | Probe | Delete


class Status(IntEnum):
    """How an op ended (per rank). Everything but `PENDING` and `OK` is a failure, and a failure is a miss."""

    PENDING = 0
    OK = 1
    MISSING = 2  # the source does not hold the object
    CORRUPT = 3  # the source holds bytes that are not this object
    FAILED = 4  # the tier raised (EIO, connection lost, …)
    FULL = 5  # no space left at the destination
    LATE = 6  # its deadline passed; if the job is not final, the memory it uses may still be written
    SKIPPED = 7  # dropped by back-pressure, or an op before it on the same slot failed
    CANCELLED = 8


JobKind = Literal["store", "load", "prefetch", "write_back", "probe", "delete"]


class Job(msgspec.Struct, frozen=True, array_like=True):
    """Ops that are reported together. `deadline` is in seconds from the start of execution, 0 = none."""

    id: int
    kind: JobKind
    ops: tuple[Op, ...]
    deadline: float = 0.0


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """What the ranks do next. A new `epoch` voids everything older. `acked[rank]` = newest report sequence applied."""

    epoch: int
    jobs: tuple[Job, ...]
    acked: tuple[int, ...]


class JobReport(msgspec.Struct, frozen=True, array_like=True):
    """The state of one job on one rank. Sent when every op has a status; `final` = nothing of it touches memory any more.

    A job with late ops is reported twice: at its deadline (`final=False`), and when the hung calls have returned.
    """

    job: int
    statuses: tuple[int, ...]
    final: bool
    nbytes: int = 0
    detail: str = ""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """All job reports of one rank that no plan has acknowledged. `seq` grows with each report of this rank and epoch."""

    epoch: int
    rank: int
    seq: int
    jobs: tuple[JobReport, ...]


class TierFacts(NamedTuple):
    """One tier, as one rank sees it. `loaded` and `busy` only grow, so that a message lost or doubled changes nothing.

    Attributes:
        used: bytes that the tier occupies, whoever wrote them.
        loaded: bytes read from it, of verified objects.
        busy: seconds in which at least one object was being read.
    """

    used: int
    loaded: int
    busy: float


__getattr__ = renamed(__name__)
