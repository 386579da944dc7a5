"""`KeyedCache`: independent objects under an engine's own keys, in a namespace of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine
from lmcache.errors import TokenError
from lmcache.keyed import KeyedCache
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

KEYS = [f"page-{n}" for n in range(6)]


def test_objects_come_back_in_any_grouping_and_from_disk(tmp_path: Path) -> None:
    source, target = Pool("packed", 40, seed=1), Pool("nhd", 40, seed=2)
    slots = scattered(6 * CHUNK, source)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as engine:
        objects = KeyedCache(engine, scope="test")
        assert objects.exists(KEYS) == 0
        assert objects.store(KEYS[3:], source.kv, slots[3 * CHUNK :]) == 3, "later pages may be stored first"
        assert objects.store(KEYS[:3], source.kv, slots) == 3
        assert objects.exists(KEYS) == 6
        assert objects.exists([*KEYS[:2], "other", *KEYS[2:]]) == 2
        engine.flush()
    with CacheEngine(config, tiny_spec()) as engine:
        objects = KeyedCache(engine, scope="test")
        assert objects.exists(KEYS[2:5]) == 3
        assert objects.load([KEYS[4], KEYS[1]], target.kv, torch.arange(2 * CHUNK)) == 2
        assert target.sequence(torch.arange(CHUNK)) == source.sequence(slots[4 * CHUNK : 5 * CHUNK])
        assert target.sequence(torch.arange(CHUNK, 2 * CHUNK)) == source.sequence(slots[CHUNK : 2 * CHUNK])


def test_scopes_salts_and_tokens_never_meet() -> None:
    pool = Pool("packed", 40)
    slots = scattered(6 * CHUNK, pool)
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        KeyedCache(engine, scope="a").store(KEYS, pool.kv, slots)
        assert KeyedCache(engine, scope="a").exists([k.encode() for k in KEYS]) == 6
        assert KeyedCache(engine, scope="b").exists(KEYS) == 0
        assert KeyedCache(engine, scope="a", salt="x").exists(KEYS) == 0
        engine.clear(salt="")
        assert KeyedCache(engine, scope="a").exists(KEYS) == 0
        with pytest.raises(TokenError, match="empty"):
            KeyedCache(engine, scope="a").exists([""])


def test_objects_without_parents_are_evicted_one_by_one() -> None:
    pool = Pool("packed", 40)
    slots = scattered(CHUNK, pool)
    with CacheEngine(tiny_config(dram_bytes=8 * tiny_spec().object_bytes(0, CHUNK)), tiny_spec()) as engine:
        objects = KeyedCache(engine, scope="a")
        for n in range(50):
            assert objects.store([f"{n}"], pool.kv, slots) == 1
        assert [n for n in range(50) if objects.exists([f"{n}"])] == list(range(42, 50))
        engine._plane.check()
