"""Messages between control plane and data plane: plain data, serialisable with msgspec.

The index (one per engine scheduler) emits a `Plan`; every rank's transfer executes the same plan and returns `Report`s. A report
is *cumulative*: it repeats every job report that no plan has acknowledged yet, so lost, duplicated or reordered reports are
harmless. Each op is one hop between two places; ops on one arena slot run in plan order, so "disk → slot 7" followed by
"slot 7 → engine" needs no explicit dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec

from lmcache.moved import renamed


class Name(NamedTuple):
    """Name of an object, the same on all ranks; with a rank's rect it becomes an `ObjectId`.

    Attributes:
        namespace: everything besides tokens that determines the values.
        chain: digest of the tokens up to and including this object.
        group: index of the layer group.
        tokens: tokens in the object.
        depth: position in the chain; 0 for unlinked names.
    """

    namespace: bytes
    chain: bytes
    group: int
    tokens: int
    depth: int


class Chain(NamedTuple):
    """A sequence of object names: by default of a token sequence, one 32-byte digest per full chunk.

    Attributes:
        namespace: everything besides tokens that determines the values.
        digests: digests, in order.
        linked: each digest covers everything before it, so that an object is useless without its predecessors. False for
            an engine's own keys, each of which is independent of the others; they have depth 0 and no parent.
    """

    namespace: bytes
    digests: Sequence[bytes]
    linked: bool = True

    def depth(self, position: int) -> int:
        """Returns the `depth` of the name at `position`."""
        return position if self.linked else 0

    def parent(self, position: int) -> bytes | None:
        """Returns the digest that the one at `position` depends on, if any."""
        return self.digests[position - 1] if self.linked and position else None


class Engine(msgspec.Struct, frozen=True, tag="engine", array_like=True):
    """The engine's KV memory, at the slots that are passed with the plan for this job."""


class ArenaSlot(msgspec.Struct, frozen=True, tag="slot", array_like=True):
    """An arena slot of the object's group. `generation` grows each time the index assigns the slot to another object."""

    index: int
    generation: int


class Tier(msgspec.Struct, frozen=True, tag="tier", array_like=True):
    """A tier below DRAM, by its position in the configured list (0 = nearest)."""

    index: int


Place = Engine | ArenaSlot | Tier


class Copy(msgspec.Struct, frozen=True, tag="copy", array_like=True):
    """Copies one object one hop. `start`: offset of its first token in the job's engine slots (if a place is `Engine`)."""

    name: Name
    src: Place
    dst: Place
    start: int = 0


class Probe(msgspec.Struct, frozen=True, tag="probe", array_like=True):
    """Checks whether a tier holds the object: `OK` = yes, `MISSING` = no."""

    name: Name
    tier: int


class Delete(msgspec.Struct, frozen=True, tag="delete", array_like=True):
    """Removes the object from a tier; `OK` also if the tier did not hold it."""

    name: Name
    tier: int


Op = Copy | Probe | Delete


class Status(IntEnum):
    """Result of an op on one rank. All but `PENDING` and `OK` are failures, which the index treats as misses."""

    PENDING = 0
    OK = 1
    MISSING = 2  # the source does not hold the object
    CORRUPT = 3  # the source holds bytes that are not this object
    FAILED = 4  # the tier raised (EIO, connection lost, …)
    FULL = 5  # no space left at the destination
    LATE = 6  # its deadline passed; until the job is final, the memory it uses may still be written
    SKIPPED = 7  # dropped by back-pressure, or because an earlier op on the same slot failed
    CANCELLED = 8
    PRESENT = 9  # of a write-back: the tier holds the object already


JobKind = Literal["store", "load", "prefetch", "write_back", "probe", "delete"]


class Job(msgspec.Struct, frozen=True, array_like=True):
    """Ops that are reported together. `deadline`: seconds from the start of execution, 0 = none."""

    id: int
    kind: JobKind
    ops: tuple[Op, ...]
    deadline: float = 0.0


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """Work for all ranks. A new `epoch` voids everything older. `acked[rank]`: newest report `seq` that was applied."""

    epoch: int
    jobs: tuple[Job, ...]
    acked: tuple[int, ...]


class JobReport(msgspec.Struct, frozen=True, array_like=True):
    """Result of one job on one rank, sent once every op has a status. `final`: none of its ops touches memory any more.

    A job with late ops is reported twice: at its deadline (`final=False`), and when its hung calls have returned.
    """

    job: int
    statuses: tuple[int, ...]
    final: bool
    nbytes: int = 0
    detail: str = ""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """All job reports of one rank that no plan has acknowledged. `seq` grows with each report of a rank and epoch."""

    epoch: int
    rank: int
    seq: int
    jobs: tuple[JobReport, ...]


class TierFacts(NamedTuple):
    """One rank's measurements of a tier. `loaded` and `busy` only grow, so that lost or duplicated messages are harmless.

    Attributes:
        used: bytes that the tier occupies, including those written by other processes.
        loaded: bytes of verified objects read from it.
        busy: seconds during which at least one object was being read.
    """

    used: int
    loaded: int
    busy: float


__getattr__ = renamed(__name__)
