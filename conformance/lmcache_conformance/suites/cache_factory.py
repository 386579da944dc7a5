"""Opens the cache under test, and provides the folder its tests use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine, Config
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier
from lmcache_conformance.labs.scratch import scratch_folder


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    """Returns token ids that depend on `seed` alone."""
    return torch.randint(0, 50_000, (count,), generator=torch.Generator().manual_seed(seed))


class CacheFactory:
    """What a subclass overrides, and the folder its tests use."""

    patience: float = 60.0
    """Seconds after which a call that has not returned counts as hung."""

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """Opens the cache; `tiers` replaces the tiers below DRAM that `config` asks for."""
        return CacheEngine(config, spec, tiers=tiers)

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """An empty folder for the disk tier."""
        with scratch_folder("lmcache-cache-") as folder:
            yield folder
