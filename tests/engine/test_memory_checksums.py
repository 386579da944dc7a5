"""Bytes that change in host memory between a store and their use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine
from lmcache.config import Checksums
from lmcache_conformance.labs.faulty_tier import FaultyTier
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

TOKENS = torch.arange(4 * CHUNK)
CORRUPTIONS = 'lmcache_corruptions_total{tier="dram"}'


def flip(engine: CacheEngine, chunk: int) -> None:
    """Flips a bit of a stored chunk in its arena slot. The first store of a cache fills its slots in order."""
    engine._rank.arenas[0].view(chunk)[37] ^= 4


@pytest.mark.parametrize("order", ["canonical", "native"])
def test_what_changed_in_memory_is_not_written(tmp_path: Path, order: str) -> None:
    pool, out = Pool("packed", 40, seed=1), Pool("packed", 40)
    slots = scattered(len(TOKENS), pool)
    slow = FaultyTier()
    slow.answers.clear()  # writes wait while the bit flips
    with CacheEngine(tiny_config(disk_order=order), tiny_spec(), tiers=[slow]) as engine:
        assert engine.store(TOKENS, pool.kv, slots) == len(TOKENS)
        flip(engine, 2)
        slow.answers.set()
        result = engine.flush()
        assert not result
        assert result.dropped == {"corrupt": 1}
        assert engine.stats()[CORRUPTIONS] == 1
        with engine.lookup(TOKENS) as hit:
            assert hit.tokens == 2 * CHUNK, "nor is it served from memory any more"
        assert engine.store(TOKENS, pool.kv, slots) == CHUNK
        assert engine.flush()
        with engine.lookup(TOKENS) as hit:
            assert engine.retrieve(hit, out.kv, slots) == len(TOKENS)
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[slow]) as later, later.lookup(TOKENS) as hit:
        assert later.retrieve(hit, out.kv, slots) == len(TOKENS)
    assert out.sequence(slots) == pool.sequence(slots)


@pytest.mark.parametrize(("checksums", "loaded"), [("load", CHUNK), ("write", 4 * CHUNK), ("off", 4 * CHUNK)])
def test_what_changed_in_memory_is_not_loaded_if_that_is_asked_for(checksums: Checksums, loaded: int) -> None:
    pool, out = Pool("packed", 40, seed=1), Pool("packed", 40)
    slots = scattered(len(TOKENS), pool)
    with CacheEngine(tiny_config(memory_checksums=checksums), tiny_spec()) as engine:
        engine.store(TOKENS, pool.kv, slots)
        flip(engine, 1)
        with engine.lookup(TOKENS) as hit:
            assert engine.retrieve(hit, out.kv, slots) == loaded
        if checksums == "load":
            assert engine.stats()[CORRUPTIONS] == 1
            assert out.sequence(slots[:CHUNK]) == pool.sequence(slots[:CHUNK])
            with engine.lookup(TOKENS) as hit:
                assert hit.tokens == CHUNK


def test_what_was_loaded_from_a_tier_is_verified_too() -> None:
    pool, out = Pool("packed", 40, seed=1), Pool("packed", 40)
    slots = scattered(len(TOKENS), pool)
    tier = FaultyTier()
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        engine.store(TOKENS, pool.kv, slots)
        engine.flush()
    with CacheEngine(tiny_config(memory_checksums="load"), tiny_spec(), tiers=[tier]) as engine:
        for expected in (4 * CHUNK, 4 * CHUNK):
            with engine.lookup(TOKENS) as hit:
                assert engine.retrieve(hit, out.kv, slots) == expected
        for slot in range(4):
            flip(engine, slot)
        with engine.lookup(TOKENS) as hit:
            assert engine.retrieve(hit, out.kv, slots) == 0
        assert engine.stats()[CORRUPTIONS] == 4
