"""Faults beyond those of the conformance suite, and many cycles without leaks."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine
from lmcache.format import file, header
from lmcache_conformance.labs.faulty_tier import TOKENS, Case, FaultyTier, FaultyTierFactory
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec


class TestFaults(FaultyTierFactory):
    def test_objects_of_a_newer_format_are_misses_and_are_left_alone(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(file, "FORMAT", header.FORMAT + 1)
        newer = FaultyTier()
        with CacheEngine(tiny_config(), tiny_spec(), tiers=[newer]) as writer:
            writer.store(TOKENS, case.source.kv, case.slots)
            writer.flush()
        case.tier.contents().update(newer.contents())
        before = dict(case.tier.contents())
        assert case.load() == 0
        case.assert_idle()
        assert case.tier.contents() == before

    def test_write_behind_is_bounded_and_a_slow_tier_never_blocks_a_store(self, case: Case) -> None:
        case.tier.answers.clear()
        pool = Pool("packed", 40, seed=9)
        accepted = [case.cache.store(TOKENS + n, pool.kv, case.slots) for n in range(1, 40)]
        assert accepted[0] == len(TOKENS)
        assert 0 in accepted, "slots waiting for write-back are not evicted: the store is skipped"
        assert case.cache.stats()['lmcache_skipped_stores_total{reason="full"}'] > 0
        case.tier.answers.set()
        case.assert_idle()
        assert case.cache.store(TOKENS + 99, pool.kv, case.slots) == len(TOKENS)


def test_ten_thousand_cycles_leave_everything_where_it_began(tmp_path: Path) -> None:
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    folder = root / f"lmcache-cycles-{os.getpid()}"
    spec = tiny_spec()
    pool = Pool("packed", 16, seed=1)
    slots = scattered(2 * CHUNK, pool)

    def cycles(engine: CacheEngine, first: int, last: int) -> None:
        for n in range(first, last):
            tokens = torch.arange(2 * CHUNK) + 7 * (n % 3000)
            engine.store(tokens, pool.kv, slots)
            with engine.lookup(tokens) as hit:
                engine.retrieve(hit, pool.kv, slots)
            if n % 5 == 0:
                engine.lookup(tokens)  # a request that ends without releasing its lease
        assert set(engine.flush().dropped) <= {"refused"}

    try:
        config = tiny_config(
            dram_bytes=16 * spec.object_bytes(0, CHUNK), disk_path=folder, disk_bytes="4MiB", lease_s=0.2
        )
        others = set(threading.enumerate())
        with CacheEngine(config, spec) as engine:
            cycles(engine, 0, 500)
            handles = len(os.listdir("/proc/self/fd"))
            memory = engine._rank.arenas[0].allocated_bytes
            cycles(engine, 500, 10_000)
            time.sleep(0.3)
            stats = engine.stats()
            assert stats["index_leases"] == 0
            assert stats["index_jobs"] == 0
            assert stats["index_slots_leaving"] == 0
            assert stats['lmcache_evictions_total{tier="dram"}'] > 1000
            engine._plane.check()
            assert engine._rank.arenas[0].allocated_bytes == memory
            assert len(os.listdir("/proc/self/fd")) <= handles
            assert len(set(threading.enumerate()) - others) <= 2 * config.io_threads + 2
            used = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
            assert used <= 4 << 20
        assert set(threading.enumerate()) <= others
    finally:
        shutil.rmtree(folder, ignore_errors=True)
