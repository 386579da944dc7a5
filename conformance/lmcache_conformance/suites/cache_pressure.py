"""A cache under pressure and with many threads: it evicts, stays within bounds, leaks nothing, serves no wrong bit."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from lmcache.plan import Status
from lmcache.tiers.base import Result
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.faulty_tier import TOKENS, Case, FaultyTierFactory, assert_idle, within
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.cache_factory import tokens_of


class CachePressureTests(FaultyTierFactory):
    """Pressure, concurrency."""

    # ---------------------------------------------------------------- pressure

    @level(Level.PRESSURE)
    def test_a_full_cache_evicts_and_keeps_storing(self) -> None:
        pool = Pool("packed", 64, seed=1)
        slots = scattered(4 * CHUNK, pool)
        spec = tiny_spec()
        with self.open_cache(tiny_config(dram_bytes=12 * spec.object_bytes(0, CHUNK)), spec) as cache:
            for n in range(20):
                tokens = tokens_of(4 * CHUNK, seed=n)
                stored = within(self.patience, lambda tokens=tokens: cache.store(tokens, pool.kv, slots))  # type: ignore[misc]
                assert stored == 4 * CHUNK, f"store {n}: only {stored} tokens stored although the cache could evict"
                with cache.lookup(tokens) as hit:
                    assert hit.tokens == 4 * CHUNK
            with cache.lookup(tokens_of(4 * CHUNK, seed=0)) as hit:
                assert (hit.tokens, hit.stop) == (0, "evicted")

    @level(Level.PRESSURE)
    def test_out_of_memory_means_misses_and_no_exception(self) -> None:
        def refuse(nbytes: int) -> torch.Tensor:
            raise MemoryError(f"no {nbytes} bytes of host memory")

        pool, target = Pool("packed", 64, seed=1), Pool("packed", 64, seed=2)
        slots = scattered(4 * CHUNK, pool)
        with mock.patch("lmcache.memory.anonymous", refuse):
            cache = self.open_cache(tiny_config(pin_memory="never"), tiny_spec())
        try:
            for _ in range(2):
                within(self.patience, lambda: cache.store(TOKENS, pool.kv, slots))
                with cache.lookup(TOKENS) as hit:
                    assert hit.tokens == 0, "a hit, although there was no memory to store anything"
                    assert within(self.patience, lambda hit=hit: cache.retrieve(hit, target.kv, slots)) == 0  # type: ignore[misc]
            assert_idle(cache, self.patience)
        finally:
            cache.close()

    @level(Level.PRESSURE)
    def test_a_leased_hit_survives_pressure(self) -> None:
        pool, target = Pool("packed", 64, seed=1), Pool("packed", 64, seed=2)
        slots = scattered(4 * CHUNK, pool)
        spec = tiny_spec()
        with self.open_cache(tiny_config(dram_bytes=12 * spec.object_bytes(0, CHUNK)), spec) as cache:
            cache.store(tokens_of(4 * CHUNK), pool.kv, slots)
            expected = pool.sequence(slots)
            with cache.lookup(tokens_of(4 * CHUNK)) as hit:
                for n in range(1, 10):
                    cache.store(tokens_of(4 * CHUNK, seed=n), Pool("packed", 64, seed=n + 10).kv, slots)
                assert cache.retrieve(hit, target.kv, slots) == 4 * CHUNK, "leased chunks were evicted"
            assert target.sequence(slots) == expected

    @level(Level.PRESSURE)
    def test_leases_of_abandoned_requests_expire(self) -> None:
        pool = Pool("packed", 64, seed=1)
        slots = scattered(4 * CHUNK, pool)
        spec = tiny_spec()
        config = tiny_config(dram_bytes=8 * spec.object_bytes(0, CHUNK), lease_s=0.2)
        with self.open_cache(config, spec) as cache:
            abandoned = []
            for n in range(60):
                tokens = tokens_of(4 * CHUNK, seed=n)
                cache.store(tokens, pool.kv, slots)
                abandoned.append(cache.lookup(tokens))
                if n % 3 == 0:
                    with cache.lookup(tokens) as hit:
                        cache.retrieve(hit, pool.kv, slots)
            time.sleep(0.3)
            assert cache.store(tokens_of(4 * CHUNK, seed=999), pool.kv, slots) == 4 * CHUNK, (
                "pins leaked: nothing can be stored any more"
            )
            assert_idle(cache, self.patience)

    @level(Level.PRESSURE)
    def test_a_hit_on_disk_may_be_larger_than_dram(self, place: Path) -> None:
        tokens = tokens_of(20 * CHUNK)
        source, target = Pool("packed", 100, seed=1), Pool("packed", 100, seed=2)
        slots = scattered(20 * CHUNK, source, seed=3)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            cache.store(tokens, source.kv, slots)
            cache.flush()
        eight = 8 * tiny_spec().object_bytes(0, CHUNK)
        with self.open_cache(tiny_config(dram_bytes=eight, disk_path=place), tiny_spec()) as cache:
            for _ in range(2):
                with cache.lookup(tokens) as hit:
                    assert hit.tokens == 20 * CHUNK
                    assert cache.retrieve(hit, target.kv, slots) == 20 * CHUNK
        assert target.sequence(slots) == source.sequence(slots)

    @level(Level.PRESSURE)
    def test_the_disk_stays_below_its_bound(self, place: Path) -> None:
        pool = Pool("packed", 64, seed=1)
        slots = scattered(16 * CHUNK, pool)
        bound = 1 << 20
        with self.open_cache(tiny_config(disk_path=place, disk_bytes=bound), tiny_spec()) as cache:
            written = 0
            for n in range(40):
                cache.store(tokens_of(16 * CHUNK, seed=n), pool.kv, slots)
                cache.flush()
                sizes = [_size(file) for file in place.rglob("*.safetensors")]
                assert sum(sizes) <= bound, f"{sum(sizes)} bytes on disk; {bound} are allowed"
                written = max(written, len(sizes))
            assert written >= 20, f"only {written} files were written"
            with cache.lookup(tokens_of(16 * CHUNK, seed=39)) as hit:
                assert hit.tokens == 16 * CHUNK

    @level(Level.PRESSURE)
    def test_a_full_tier_costs_only_the_copy_in_it(self, case: Case) -> None:
        case.tier.writes = lambda writes: [Result(Status.FULL, 0, "injected")] * len(writes)
        pool = Pool("packed", 40, seed=9)
        for n in range(1, 40):
            assert case.cache.store(TOKENS + n, pool.kv, case.slots) == len(TOKENS), f"round {n}"
            assert not case.cache.flush(), "flush claims what a full tier did not take"
        case.assert_idle()

    # ---------------------------------------------------------------- concurrency

    @level(Level.CONCURRENCY)
    @pytest.mark.parametrize("caches", [1, 2])
    def test_sixteen_threads_share_caches_on_one_folder(self, place: Path, caches: int) -> None:
        spec = tiny_spec()
        config = tiny_config(dram_bytes=24 * spec.object_bytes(0, CHUNK), disk_path=place)
        opened = [self.open_cache(config, spec) for _ in range(caches)]
        wrong: list[str] = []

        def work(seed: int) -> None:
            cache = opened[seed % caches]
            source, target = Pool("packed", 40, seed=seed % 4), Pool("packed", 40, seed=50 + seed)
            slots = scattered(len(TOKENS), source, seed=3)
            tokens = TOKENS + 1000 * (seed % 4)
            for step in range(12):
                cache.store(tokens, source.kv, slots)
                with cache.lookup(tokens) as hit:
                    if step % 5 == 4:
                        continue  # cancelled
                    loaded = cache.retrieve(hit, target.kv, slots)
                if target.sequence(slots[:loaded]) != source.sequence(slots[:loaded]):
                    wrong.append(f"thread {seed}, step {step}")

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(16)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
                assert not thread.is_alive(), "a thread hangs"
            assert not wrong, f"wrong bits in {wrong}"
            for cache in opened:
                assert_idle(cache, self.patience)
        finally:
            for cache in opened:
                cache.close()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # evicted just now
        return 0
