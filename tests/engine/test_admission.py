"""Admission to a real, small, full disk: fewer writes, no fewer hits, also after a restart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine
from lmcache.keyed import KeyedCache
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.janitor import Timing
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

CAPACITY = 1 << 20  # about 140 objects
PROMPT = 4 * CHUNK


def disk(path: Path) -> DiskTier:
    """A disk tier that records times of use to a hundredth of a second."""
    return DiskTier(path, CAPACITY, timing=Timing(grain=0.01))


def engine(path: Path, admission: str, **changes: object) -> CacheEngine:
    dram = 16 * tiny_spec().object_bytes(0, CHUNK)
    return CacheEngine(tiny_config(dram_bytes=dram, admission=admission, **changes), tiny_spec(), tiers=[disk(path)])


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(0, 50_000, (PROMPT,), generator=torch.Generator().manual_seed(seed))


def traffic() -> list[int]:
    """Returns seeds of prompts: eight that recur, among hundreds that do not."""
    rng = random.Random(5)
    return [rng.randrange(8) if i % 8 == 0 else 100 + i for i in range(1000)]


def serve(cache: CacheEngine, seeds: list[int], pool: Pool) -> int:
    """Looks up, loads and stores each prompt, as an engine does; returns how many tokens were loaded."""
    slots = scattered(PROMPT, pool)
    loaded = 0
    for seed in seeds:
        tokens = prompt(seed)
        with cache.lookup(tokens) as hit:
            loaded += cache.retrieve(hit, pool.kv, slots)
        cache.store(tokens, pool.kv, slots)
        assert set(cache.flush(timeout=30).dropped) <= {"refused"}
    return loaded


def written(cache: CacheEngine) -> float:
    return cache.stats()['lmcache_moved_bytes_total{src="dram",dst="disk"}']


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, float, float, int]]:
    """Returns admission → tokens loaded, bytes written, objects refused, tokens of the eight found after a restart."""
    found = {}
    for admission in ("all", "second", "adaptive"):
        path = tmp_path_factory.mktemp(admission)
        pool = Pool("packed", 100, seed=1)
        with engine(path, admission) as cache:
            loaded = serve(cache, traffic(), pool)
            refused = cache.stats().get('lmcache_skipped_stores_total{reason="admission"}', 0.0)
            assert cache.stats().get("index_refused", 0.0) == refused
            result = loaded, written(cache), refused
        with engine(path, admission) as cache:
            again = 0
            for seed in range(8):
                with cache.lookup(prompt(seed)) as hit:
                    again += hit.tokens
        found[admission] = (*result, again)
    return found


def test_on_a_full_disk_less_is_written_and_no_less_found(served: dict[str, tuple[int, float, float, int]]) -> None:
    everything = served["all"]
    assert everything[2] == 0
    for selective in (served["second"], served["adaptive"]):
        assert selective[0] >= everything[0]
        assert selective[1] <= 0.4 * everything[1]
        assert selective[2] > 1000


def test_after_a_restart_what_comes_back_is_there(served: dict[str, tuple[int, float, float, int]]) -> None:
    assert served["second"][3] >= served["all"][3]
    assert served["adaptive"][3] >= 7 * PROMPT


def test_while_there_is_room_everything_is_written_also_after_a_restart(tmp_path: Path) -> None:
    pool = Pool("packed", 100, seed=1)
    for first in (0, 10):
        with engine(tmp_path, "second") as cache:
            serve(cache, list(range(first, first + 10)), pool)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 80


def test_a_full_disk_is_known_to_be_full_after_a_restart(tmp_path: Path) -> None:
    pool = Pool("packed", 100, seed=1)
    with engine(tmp_path, "second") as cache:
        serve(cache, list(range(60)), pool)
    with engine(tmp_path, "second") as cache:
        serve(cache, list(range(100, 110)), pool)
        assert cache.stats()["index_refused"] >= 36


def test_room_that_was_made_is_used(tmp_path: Path) -> None:
    pool = Pool("packed", 100, seed=1)
    with engine(tmp_path, "second") as cache:
        serve(cache, list(range(60)), pool)
        before = cache.stats()["index_refused"]
        assert before
        cache.clear()
        serve(cache, list(range(100, 105)), pool)
        assert cache.stats()["index_refused"] == before
    assert len(list(tmp_path.rglob("*.safetensors"))) == 20


def test_objects_under_an_engines_own_keys_are_subject_to_it_too(tmp_path: Path) -> None:
    pool = Pool("packed", 100, seed=1)
    slots = scattered(PROMPT, pool)
    with engine(tmp_path, "second") as cache:
        objects = KeyedCache(cache, scope="test")
        for i in range(80):
            assert objects.store([f"{i}-{k}" for k in range(4)], pool.kv, slots) == 4
            cache.flush()
        assert cache.stats()["index_refused"] > 100
        assert objects.store(["79-0"], pool.kv, slots[:CHUNK]) == 0, "it is in DRAM"
        for i in range(100, 110):  # evicts it from DRAM
            objects.store([f"{i}-{k}" for k in range(4)], pool.kv, slots)
        before = written(cache)
        assert objects.store([f"79-{k}" for k in range(4)], pool.kv, slots) == 4
        cache.flush()
        assert written(cache) > before, "it was not written when stored again"


def test_a_tier_that_loads_slower_than_its_kv_is_computed_is_written_no_more(tmp_path: Path) -> None:
    pool = Pool("packed", 100, seed=1)
    with engine(tmp_path, "all", prefill_tokens_per_s=1e12) as cache:
        serve(cache, list(range(20)), pool)
        assert cache.stats().get("index_refused", 0) == 0, "its throughput is not measured yet"
        pace = cache._plane.admission._pace
        assert pace is not None
        rounds = 0
        while not pace._load.get(0) or len(pace._load[0]) < pace.FEW:  # one measurement takes 8 MiB
            serve(cache, list(range(20)), pool)
            rounds += 1
            assert rounds < 2000
        serve(cache, [1000], pool)
        assert cache.stats()["index_refused"] == 4
