"""Caches that need too much of their host, or open it to the network."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch

from lmcache import CacheEngine, Config
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier
from lmcache_conformance.mutants import mutant
from lmcache_conformance.mutants.brokencache import BrokenCacheTests


@mutant(
    row="pinned allocation fails on WSL2 / containers and the server will not start", project="LMCache #1063, WSL #8447"
)
class MutantMustPin(BrokenCacheTests):
    """Starts only where memory can be pinned."""

    settings = {"pin_memory": "always"}  # noqa: RUF012

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """Does not pin where there is no GPU."""
        if not torch.cuda.is_available():
            return CacheEngine(config, spec, tiers=tiers)
        return super().open_cache(config, spec, tiers)


class _Listens(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._admin = socket.create_server(("0.0.0.0", 0))

    def close(self) -> None:
        self._admin.close()
        super().close()


@mutant(row="unauthenticated admin endpoint on 0.0.0.0 runs scripts", project="LMCache #5128")
class MutantListens(BrokenCacheTests):
    """Opens an administration port on all interfaces."""

    cache_class = _Listens
