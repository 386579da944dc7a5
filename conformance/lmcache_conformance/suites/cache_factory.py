"""How a suite opens the cache under test, and the folder its tests use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine, Config
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    """Token ids that depend on `seed` alone."""
    return torch.randint(0, 50_000, (count,), generator=torch.Generator().manual_seed(seed))


class CacheFactory:
    """What a subclass says, and the folder its tests use."""

    patience: float = 60.0
    """Seconds after which a call that has not returned counts as hung."""

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """Open the cache; `tiers` replaces what `config` says about tiers below DRAM."""
        return CacheEngine(config, spec, tiers=tiers)

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """A folder, in memory where the host has such a thing."""
        base = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="lmcache-cache-", dir=base if base.is_dir() else None))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
