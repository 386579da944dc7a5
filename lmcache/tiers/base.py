"""What a tier is: a place below the arena that holds objects as opaque bytes under their `ObjectId`.

The framework guarantees: calls come from several threads, never from the engine's own; buffers stay valid until the call
returns; an `ObjectId` always names the same values (though the *encoding* of two writers may differ), so whichever write
comes first wins; everything read is verified (header, id, length, checksums) above the tier before anyone uses it.

The implementer must: block until done or until `deadline` (a `time.monotonic()` value) has passed; report per item and
never raise for one bad item; publish a write whole or not at all; keep no reference to a buffer after returning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from lmcache.keys import ObjectId
from lmcache.plan import Status


class Range(NamedTuple):
    """Bytes [offset, offset + length) of an object's stored form."""

    offset: int
    length: int


class Read(NamedTuple):
    """Read `ranges[i]` of the object's stored bytes into `buffers[i]`, a writable byte memoryview of that length.

    A range may reach past the end of the object (a reader who does not know the header's size asks for more); the
    result's `nbytes` tells how much there was.
    """

    id: ObjectId
    buffers: Sequence[memoryview]
    ranges: Sequence[Range]


class Write(NamedTuple):
    """Store the concatenation of `parts` under `id`; an object that is already there is kept, which counts as `OK`."""

    id: ObjectId
    parts: Sequence[memoryview | bytes]


class Result(NamedTuple):
    """How one item went. `nbytes` = bytes moved; `detail` = one line for the log if it failed."""

    status: Status
    nbytes: int = 0
    detail: str = ""


class Found(NamedTuple):
    """One object met by `scan`. `nbytes` = stored size, header included."""

    id: ObjectId
    nbytes: int


def usable_bytes(tier: Tier) -> int | None:
    """Bytes that can be in a tier before it evicts (`usable_bytes`, else `capacity_bytes`); None: it has no limit."""
    found: int | None = getattr(tier, "usable_bytes", getattr(tier, "capacity_bytes", None))
    return found


@runtime_checkable
class Tier(Protocol):
    """A place that holds objects. See the module's docstring for who guarantees what."""

    name: str
    """Short label for metrics and logs: `disk`, `redis`, …"""

    shared: bool
    """Whether other processes may add objects, so that the index must probe instead of trusting its own knowledge."""

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """`OK` or `MISSING` per id (or a failure); no side effect."""
        ...

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """Fill each read's buffers; `MISSING` if there is no such object."""
        ...

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """Publish each object whole or not at all, visible to others on return; `FULL` when there is no room."""
        ...

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Remove; what is not there counts as removed."""
        ...

    def clear(self, namespace: bytes | None = None) -> int:
        """Remove every object (of one namespace); returns how many went. Afterwards none of them is served."""
        ...

    def scan(self) -> Iterator[Found]:
        """Every object present, in no particular order; objects that come or go meanwhile may or may not be met."""
        ...

    def flush(self, *, durable: bool = False) -> None:
        """Return once everything written is visible and survives kill −9; `durable`: also power loss."""
        ...

    def used_bytes(self) -> int:
        """Bytes occupied, as far as known without a scan."""
        ...

    def close(self) -> None:
        """Release handles and locks; idempotent. Objects stay."""
        ...
