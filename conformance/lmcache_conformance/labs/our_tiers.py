"""The suite applied to the bundled tiers, with raw access that bypasses them. Base classes of targets, mutants and tests."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

from lmcache.keys import ObjectId
from lmcache.tiers.base import Tier
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import relative_path
from lmcache.tiers.janitor import Timing
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.suites.tiers import TierCapabilities, TierTests

QUICK = Timing(tick=0.02, rescan=0.1, patience=2.0)
"""Janitor timing short enough for tests."""


class MemoryTierTests(TierTests):
    """The suite for `lmcache.tiers.memory.MemoryTier` and its subclasses."""

    capabilities = TierCapabilities(bounded=True, raw=True)
    tier_class: type[MemoryTier] = MemoryTier

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """See `TierTests`."""
        return self.tier_class(capacity)

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """Reads the tier's dict directly."""
        assert isinstance(tier, MemoryTier)
        return tier._objects.get(id)

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """Returns the keys of the tier's dict."""
        assert isinstance(tier, MemoryTier)
        return [str(id) for id in tier._objects]


class DiskTierTests(TierTests):
    """The suite for `lmcache.tiers.disk.DiskTier` and its subclasses."""

    capabilities = TierCapabilities(
        persistent=True, durable=True, bounded=True, shared=True, raw=True, damage=True, full_device=True
    )
    tier_class: type[DiskTier] = DiskTier

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """See `TierTests`."""
        return self.tier_class(place, capacity, timing=QUICK)

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """Reads the object's file."""
        path = place / "objects" / relative_path(id)
        return path.read_bytes() if path.is_file() else None

    def raw_put(self, tier: Tier, place: Path, id: ObjectId, data: bytes) -> None:
        """Writes or overwrites the object's file."""
        path = place / "objects" / relative_path(id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """Returns every file below `objects`."""
        return [name for _, _, names in os.walk(place / "objects") for name in names]

    def full_device(self, place: Path) -> AbstractContextManager[None]:
        """Makes every write of this process fail with ENOSPC, as on a full disk."""
        return enospc()


@contextmanager
def enospc() -> Iterator[None]:
    """Makes every write of this process fail with ENOSPC."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(os, "pwritev", refuse), mock.patch.object(os, "write", refuse):
        yield
