"""Opens the data plane of one rank from the settings: tiers, arenas, and the transfer between them and the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from lmcache.config import Config
from lmcache.errors import TierError
from lmcache.format.codec import ObjectCodec
from lmcache.memory import anonymous, host_provider, pinned
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import TierFacts
from lmcache.spec import KVSpec
from lmcache.tiers import open_tiers
from lmcache.tiers.base import Tier, clear_epoch, cleared_since, usable_bytes
from lmcache.transfer.arena import Arena, share_out
from lmcache.transfer.engine_copy import open_copier
from lmcache.transfer.transfer import Transfer

CLOSE_S = 5.0
"""Seconds that closing waits for threads before it abandons a hung tier call."""


class Rank:
    """One rank's tiers, arenas and transfer.

    Attributes:
        transfer: executes plans.
        tiers: nearest first.
        arenas: one per group.
        memory: the kind of host memory that the arenas use and why, for the log.
    """

    def __init__(
        self, transfer: Transfer, tiers: Sequence[Tier], arenas: Sequence[Arena], memory: str, log: Throttle
    ) -> None:
        self.transfer = transfer
        self.tiers = list(tiers)
        self.arenas = list(arenas)
        self.memory = memory
        self._log = log
        self._clear_epochs = [clear_epoch(tier) for tier in self.tiers]

    @property
    def slots(self) -> tuple[int, ...]:
        """Arena slots per group."""
        return tuple(arena.slots for arena in self.arenas)

    def measure(self) -> None:
        """Measures the used bytes of every tier that evicts (blocking); `facts` adds later writes."""
        for position, tier in enumerate(self.tiers):
            if usable_bytes(tier) is not None:
                self.transfer.tier_copier.measure_safely(position)

    def facts(self) -> list[TierFacts]:
        """Returns fill level and throughput of each tier, without calling it."""
        return self.transfer.tier_copier.facts()

    def flush(self, *, durable: bool = False) -> None:
        """Waits until everything written to the tiers is visible and survives kill −9 (`durable`: and power loss)."""
        for tier in self.tiers:
            tier.flush(durable=durable)

    def cleared_elsewhere(self) -> list[bytes | None]:
        """Returns the namespaces (None: all) that other processes have cleared since the last call, without calling a tier."""
        found: list[bytes | None] = []
        for position, tier in enumerate(self.tiers):
            self._clear_epochs[position], cleared = cleared_since(tier, self._clear_epochs[position])
            found += cleared
        return found

    def clear(self, namespaces: Sequence[bytes] | None) -> int:
        """Removes every object (of these namespaces) from the tiers; returns how many.

        Raises:
            TierError: some objects could not be removed and may still be served.
        """
        wanted: Sequence[bytes | None] = [None] if namespaces is None else namespaces
        removed = 0
        for position, tier in enumerate(self.tiers):
            removed += sum(tier.clear(namespace) for namespace in wanted)
            kept = 0
            if not hasattr(tier, "clear_epoch"):  # otherwise what is there now was written after the clear
                kept = sum(1 for found in tier.scan() if namespaces is None or found.id.namespace in namespaces)
            if kept:
                raise TierError(
                    f"{kept} objects are still on tier {tier.name!r} and may be served: "
                    "stop other processes that write to it, or make it writable, and clear again"
                )
            if usable_bytes(tier) is not None:
                self.transfer.tier_copier.measure_safely(position)
        return removed

    def close(self, timeout: float = CLOSE_S) -> None:
        """Finishes queued work, ends the threads, closes the tiers; after `timeout` seconds abandons calls that still hang."""
        until = time.monotonic() + timeout
        if self.transfer.close(max(0.0, until - time.monotonic())):
            for tier in self.tiers:
                tier.close()
        else:
            self._log.warning("close-incomplete", reason="a tier call still hangs; its threads are left behind")


def open_rank(
    config: Config,
    spec: KVSpec,
    metrics: Metrics,
    log: Throttle,
    *,
    rank: int = 0,
    ranks: int = 1,
    chunk_tokens: int | None = None,
    tiers: Sequence[Tier] | None = None,
    prefault_bytes: int = 0,
) -> Rank:
    """Opens the data plane of one of `ranks` ranks.

    Args:
        config: settings. Memory and queue sizes are for all ranks of this host together.
        spec: spec of this rank's KV.
        metrics, log: where failures are counted and logged.
        rank, ranks: this rank's number, and how many there are.
        chunk_tokens: tokens per chunk, if the engine's blocks require another number than `config.chunk_tokens`.
        tiers: the tiers below DRAM, nearest first; by default those in `config`.
        prefault_bytes: bytes of pageable host memory that are prefaulted ahead of use, all groups together.

    Raises:
        ConfigError: memory cannot be pinned, and `config.pin_memory` requires it.
        TierError: a tier cannot be opened and `config.strict` is set; otherwise the rank runs without it.
    """
    chunk = chunk_tokens or config.chunk_tokens
    opened = list(tiers) if tiers is not None else open_tiers(config, metrics, log)
    sizes = [spec.object_bytes(group, chunk) for group in range(len(spec.groups))]
    budget = (config.dram_bytes or (config.queue_bytes if opened else 0)) // ranks
    provider, memory = host_provider(config.pin_memory)
    ahead = prefault_bytes // len(sizes) if provider is anonymous else 0
    arenas = [
        Arena(slots, size, provider, ahead_bytes=ahead, reserve=provider is pinned)
        for slots, size in zip(share_out(budget, sizes), sizes, strict=True)
    ]
    transfer = Transfer(
        spec,
        chunk,
        arenas,
        opened,
        io=ObjectCodec(spec, chunk, order=config.disk_order, reslice=config.share == "semantic"),
        metrics=metrics,
        log=log,
        rank=rank,
        read_threads=config.io_threads,
        write_threads=config.io_threads,
        queue_bytes=config.queue_bytes // ranks,
        checksums=config.memory_checksums if opened or config.memory_checksums == "load" else "off",
        open_copier=partial(
            open_copier, staging_bytes=config.staging_bytes, copy_engine_bytes=config.copy_engine_bytes
        ),
    )
    return Rank(transfer, opened, arenas, memory, log)
