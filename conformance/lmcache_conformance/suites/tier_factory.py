"""What a tier claims, and how the suite opens it and looks behind it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from lmcache.keys import ObjectId
from lmcache.tiers.base import Tier


class TierCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier claims. What it does not claim is skipped; what it claims must pass.

    Attributes:
        persistent: objects survive `close` and are there when the same place is opened again, in any process.
        bounded: `open_tier` honours `capacity`.
        shared: several openers of one place (in one or more processes) see each other's objects at once.
        raw: `raw_get` and `raw_files` reach what is stored without the tier.
        damage: so does `raw_put`: bytes can be lost or changed behind the tier's back.
        full_device: `full_device` makes the medium refuse writes for lack of space.
    """

    persistent: bool = False
    bounded: bool = False
    shared: bool = False
    raw: bool = False
    damage: bool = False
    full_device: bool = False


class TierFactory:
    """What a subclass says, and the fixtures of its tests."""

    capabilities: TierCapabilities = TierCapabilities()
    machine_examples: int = 20
    """How many random histories the state machine tries."""

    patience: float = 60.0
    """Seconds after which a tier that still refuses writes, though there is space again, counts as stuck."""

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """Open the tier at `place`, an empty folder that is the same in each call of one test.

        `capacity`: at most so many bytes, None = no limit.
        """
        raise NotImplementedError

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """What is really stored under `id`, read without the tier."""
        raise NotImplementedError

    def raw_put(self, tier: Tier, place: Path, id: ObjectId, data: bytes) -> None:
        """Put `data` where the tier would look for `id`, replacing what is there, without the tier."""
        raise NotImplementedError

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """Names of everything that holds object bytes, finished or not, listed without the tier."""
        raise NotImplementedError

    def full_device(self, place: Path) -> AbstractContextManager[None]:
        """While it is entered, the medium has no space left, for whatever reason the tier itself can't foresee."""
        raise NotImplementedError

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """Where the tier may keep things: in memory where the host has such a folder, for this is about *what* it does."""
        base = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="lmcache-tier-", dir=base if base.is_dir() else None))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    @pytest.fixture
    def tier(self, place: Path) -> Iterator[Tier]:
        """The tier, open."""
        tier = self.open_tier(place, None)
        yield tier
        tier.close()
