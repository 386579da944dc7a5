"""The tier interface: a store below the arena that keeps objects as opaque bytes under their `ObjectId`.

The framework guarantees: calls come from several threads, never from the engine's own; buffers stay valid until the call
returns; an `ObjectId` always names the same values (the *encoding* may differ between writers), so the first write wins;
everything read is verified (header, id, length, checksums) above the tier before it is used.

The implementer must: block until done or until `deadline` (a `time.monotonic()` value) has passed; report a result per item
and never raise for one bad item; publish a write completely or not at all; keep no reference to a buffer after returning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from lmcache.keys import ObjectId
from lmcache.plan import Status


class Range(NamedTuple):
    """Bytes [offset, offset + length) of an object's stored form."""

    offset: int
    length: int


class Read(NamedTuple):
    """A request to read `ranges[i]` of the object's stored bytes into `buffers[i]`, a writable byte memoryview of that length.

    A range may extend past the end of the object (a reader that does not know the header's size requests more); the
    result's `nbytes` is the number of bytes actually read.
    """

    id: ObjectId
    buffers: Sequence[memoryview]
    ranges: Sequence[Range]


class Write(NamedTuple):
    """A request to store the concatenation of `parts` under `id`. An existing object is kept; that counts as `OK`.

    `begun`: a `time.monotonic()` before the values were gathered; None: now. A tier that knows of clears by other processes
    answers `CANCELLED`, and publishes nothing, if the object's namespace has been cleared since.
    """

    id: ObjectId
    parts: Sequence[memoryview | bytes]
    begun: float | None = None


class Result(NamedTuple):
    """Outcome of one item. `nbytes`: bytes moved. `detail`: one line for the log if it failed."""

    status: Status
    nbytes: int = 0
    detail: str = ""


class Found(NamedTuple):
    """One object listed by `scan`. `nbytes`: stored size, header included."""

    id: ObjectId
    nbytes: int


def usable_bytes(tier: Tier) -> int | None:
    """Returns how many bytes a tier holds before it evicts (`usable_bytes`, else `capacity_bytes`); None: no limit."""
    found: int | None = getattr(tier, "usable_bytes", getattr(tier, "capacity_bytes", None))
    return found


def clear_epoch(tier: Tier) -> int:
    """Returns how often a tier was cleared, by any process and as far as known without I/O; 0 if it does not tell."""
    return getattr(tier, "clear_epoch", 0)


def cleared_since(tier: Tier, epoch: int) -> tuple[int, list[bytes | None]]:
    """Returns a tier's `clear_epoch`, and the namespaces (None: everything) that other processes have cleared since `epoch`, as
    far as known without I/O. A tier that tells has the method `cleared_since`.
    """
    tell = getattr(tier, "cleared_since", None)
    return (epoch, []) if tell is None else tell(epoch)


def refusal(closed: bool, deadline: float | None) -> Result | None:
    """Returns the result of an item that must not start: the tier is closed or the deadline has passed. None: go ahead."""
    if closed:
        return Result(Status.FAILED, 0, "the tier is closed")
    if deadline is not None and time.monotonic() > deadline:
        return Result(Status.LATE, 0, "the deadline had passed")
    return None


@runtime_checkable
class Tier(Protocol):
    """A store of objects. The module's docstring lists what the framework guarantees and what an implementer must do."""

    name: str
    """Short label for metrics and logs: `disk`, `redis`, …"""

    shared: bool
    """Whether other processes may add objects, so that the index must probe the tier instead of relying on its directory."""

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Returns `OK` or `MISSING` per id (or a failure). Has no side effect."""
        ...

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """Fills each read's buffers; `MISSING` if there is no such object."""
        ...

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """Publishes each object completely or not at all, visible to others on return; `FULL` when there is no room. What is
        `LATE` is not published, then or later.
        """
        ...

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Removes objects; an absent object counts as removed."""
        ...

    def clear(self, namespace: bytes | None = None) -> int:
        """Removes every object (of one namespace) and returns their number. Afterwards none of them is served."""
        ...

    def scan(self) -> Iterator[Found]:
        """Yields every object in no particular order; objects added or removed meanwhile may or may not be included."""
        ...

    def flush(self, *, durable: bool = False) -> None:
        """Returns once everything written is visible and survives kill −9; with `durable`, also a power loss."""
        ...

    def used_bytes(self) -> int:
        """Returns the bytes occupied, as far as known without a scan."""
        ...

    def close(self) -> None:
        """Releases handles and locks. Objects are kept. Idempotent."""
        ...
