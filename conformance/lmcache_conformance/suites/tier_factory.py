"""A tier's capabilities, and the methods with which the suite opens it and accesses its storage directly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from lmcache.keys import ObjectId
from lmcache.tiers.base import Tier
from lmcache_conformance.labs.scratch import scratch_folder


class TierCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier supports. Tests of unclaimed capabilities are skipped; tests of claimed ones must pass.

    Attributes:
        persistent: objects survive `close`, and after a flush kill −9, and are present when the same place is opened again, in
            any process.
        durable: `flush(durable=True)` survives a power loss of this machine: objects are in files below `place`, and it syncs
            them. A tier whose storage is on another machine cannot be observed, and does not claim it.
        bounded: `open_tier` respects `capacity`.
        shared: several openers of one place (in one or more processes) see each other's objects immediately.
        raw: `raw_get` and `raw_files` are implemented: they read the storage without the tier.
        damage: `raw_put` is implemented: it changes the storage without the tier.
        full_device: `full_device` is implemented: it makes writes fail for lack of space.
    """

    persistent: bool = False
    durable: bool = False
    bounded: bool = False
    shared: bool = False
    raw: bool = False
    damage: bool = False
    full_device: bool = False


class TierFactory:
    """What a subclass overrides, and the fixtures of the tests."""

    capabilities: TierCapabilities = TierCapabilities()
    machine_examples: int = 20
    """Number of random histories that the state machine runs."""

    many: int = 1_100
    """Number of objects in the test of listings: more than a store lists or deletes in one request (1,000)."""

    largest: int = 81 << 20
    """Size in bytes of the largest object that the suite writes: a chunk of 256 tokens of a 70B model has 80 MiB."""

    patience: float = 60.0
    """Seconds after which a tier that still refuses writes, although there is space again, counts as stuck."""

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """Opens the tier.

        Args:
            place: a folder, empty at first, the same in all calls of one test.
            capacity: in bytes; None for no limit.
        """
        raise NotImplementedError

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """Returns the bytes stored under `id`, read without the tier; None if there are none."""
        raise NotImplementedError

    def raw_put(self, tier: Tier, place: Path, id: ObjectId, data: bytes) -> None:
        """Stores `data` where the tier would look for `id`, replacing any existing object, without the tier."""
        raise NotImplementedError

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """Returns the names of everything that holds object bytes, complete or not, listed without the tier."""
        raise NotImplementedError

    def full_device(self, place: Path) -> AbstractContextManager[None]:
        """Returns a context manager within which the medium has no space left, unforeseeable for the tier."""
        raise NotImplementedError

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """An empty folder in which the tier may store objects."""
        with scratch_folder("lmcache-tier-") as folder:
            yield folder

    @pytest.fixture
    def tier(self, place: Path) -> Iterator[Tier]:
        """Yields an open tier without a capacity."""
        tier = self.open_tier(place, None)
        yield tier
        tier.close()
