"""Our own tiers bound to the suite, with their ways around the tier: what targets, mutants and our tests build upon."""

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
"""A janitor that a test need not wait for."""


class MemoryTierTests(TierTests):
    """The suite for `lmcache.tiers.memory.MemoryTier`, or something derived from it."""

    capabilities = TierCapabilities(bounded=True, raw=True)
    tier_class: type[MemoryTier] = MemoryTier

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """See `TierTests`."""
        return self.tier_class(capacity)

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """The dict itself."""
        assert isinstance(tier, MemoryTier)
        return tier._objects.get(id)

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """The dict's keys."""
        assert isinstance(tier, MemoryTier)
        return [str(id) for id in tier._objects]


class DiskTierTests(TierTests):
    """The suite for `lmcache.tiers.disk.DiskTier`, or something derived from it."""

    capabilities = TierCapabilities(persistent=True, bounded=True, shared=True, raw=True, damage=True, full_device=True)
    tier_class: type[DiskTier] = DiskTier

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """See `TierTests`."""
        return self.tier_class(place, capacity, timing=QUICK)

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """The file of that name."""
        path = place / "objects" / relative_path(id)
        return path.read_bytes() if path.is_file() else None

    def raw_put(self, tier: Tier, place: Path, id: ObjectId, data: bytes) -> None:
        """Overwrite the file of that name, or make it."""
        path = place / "objects" / relative_path(id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """Every file below `objects`."""
        return [name for _, _, names in os.walk(place / "objects") for name in names]

    def full_device(self, place: Path) -> AbstractContextManager[None]:
        """Every byte written by this process meets ENOSPC: what a full disk does, and can't be made to do on demand."""
        return enospc()


@contextmanager
def enospc() -> Iterator[None]:
    """No byte can be written by this process."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(os, "pwritev", refuse), mock.patch.object(os, "write", refuse):
        yield
