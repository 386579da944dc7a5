"""Properties of `CacheEngine` beyond the contract of caches, which the conformance suite tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache import CacheEngine, Layout, PagedKV
from lmcache.control.outcomes import FlushResult
from lmcache.errors import LayoutError, LMCacheError, SlotError, SpecError, TierError, TokenError
from lmcache.keys import ObjectId, namespace_of
from lmcache.plan import Status
from lmcache.simulate.trace import read_traces
from lmcache.tiers.base import Result
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.memory import MemoryTier
from lmcache.transfer.engine_copy import HostCopier
from lmcache.transfer.workers import Workers
from lmcache_conformance.labs.faulty_tier import FaultyTier
from lmcache_conformance.labs.kv_pool import CHUNK, DIM, HEADS, LAYERS, Pool, bits, scattered, tiny_config, tiny_spec


def tokens_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50_000, (n,), generator=torch.Generator().manual_seed(seed))


def test_without_dram_everything_passes_through_to_the_disk(tmp_path: Path) -> None:
    tokens = tokens_of(20 * CHUNK)
    pool = Pool("packed", 100, seed=1)
    with CacheEngine(tiny_config(dram_bytes=0, disk_path=tmp_path), tiny_spec()) as engine:
        assert engine.store(tokens, pool.kv, scattered(20 * CHUNK, pool)) == 20 * CHUNK
    assert len(list(tmp_path.rglob("*.safetensors"))) == 20


def test_clear_reaches_earlier_weights_versions_and_loras(tmp_path: Path) -> None:
    tokens = tokens_of(CHUNK)
    pool = Pool("nhd", 40)
    with CacheEngine(tiny_config(disk_path=tmp_path), tiny_spec()) as engine:
        engine.store(tokens, pool.kv, scattered(CHUNK, pool), salt="a", lora="x")
        engine.set_weights_version(1)
        engine.store(tokens, pool.kv, scattered(CHUNK, pool), salt="a")
        engine.flush()
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2
        engine.clear(salt="a")
        assert not list(tmp_path.rglob("*.safetensors"))


def test_a_name_made_while_the_weights_change_is_not_remembered_for_the_new_ones(monkeypatch) -> None:
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        changing: list[threading.Thread] = []

        def slow(*args: object, **kwargs: object) -> bytes:
            named = namespace_of(*args, **kwargs)
            changing.append(threading.Thread(target=engine.set_weights_version, args=(1,)))
            changing[-1].start()
            changing[-1].join(0.1)  # it must wait until this name is complete
            return named

        with monkeypatch.context() as patch:
            patch.setattr("lmcache.control.namespaces.namespace_of", slow)
            before = engine.namespace()
        changing[-1].join()
        assert engine.namespace() != before


@pytest.mark.parametrize("dram_bytes", [0, 1 << 20])
def test_a_load_for_which_no_thread_could_be_started_never_writes(monkeypatch, dram_bytes: int) -> None:
    first, second = tokens_of(4 * CHUNK), tokens_of(CHUNK, seed=1)
    pool = Pool("nhd", 40, seed=1)
    config, tier = tiny_config(dram_bytes=dram_bytes), MemoryTier()
    monkeypatch.setattr(tier, "close", lambda: None)  # the tier is reused
    with CacheEngine(config, tiny_spec(), tiers=[tier]) as engine:
        for tokens in (first, second):
            engine.store(tokens, pool.kv, scattered(len(tokens), pool))

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    mine = Pool("nhd", 40)
    with CacheEngine(config, tiny_spec(), tiers=[tier]) as engine:
        with engine.lookup(first) as hit, monkeypatch.context() as patch:
            assert hit.tokens == 4 * CHUNK
            patch.setattr(threading.Thread, "start", none_left)
            assert engine.retrieve(hit, mine.kv, torch.arange(4 * CHUNK)) == 0
        before = mine.sequence(torch.arange(4 * CHUNK))
        with engine.lookup(second) as hit:
            assert engine.retrieve(hit, mine.kv, torch.arange(4 * CHUNK, 5 * CHUNK)) == CHUNK
    assert mine.sequence(torch.arange(4 * CHUNK)) == before


def test_a_load_that_no_thread_could_carry_out_holds_nothing(monkeypatch) -> None:
    tokens, pool, tier = tokens_of(4 * CHUNK), Pool("nhd", 40, seed=1), MemoryTier()
    monkeypatch.setattr(tier, "close", lambda: None)  # the tier is reused
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        with engine.lookup(tokens[: 2 * CHUNK]) as hit:
            assert engine.retrieve(hit, pool.kv, torch.arange(2 * CHUNK)) == 2 * CHUNK  # these are in DRAM now
        engine._rank.transfer.tier_copier._readers = [Workers("none", 2)]
        with engine.lookup(tokens) as hit, monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            assert engine.retrieve(hit, pool.kv, torch.arange(4 * CHUNK)) == 2 * CHUNK, "not exactly what is in DRAM"
        assert engine._driver.drain(10, "load")
        assert engine.stats()["index_jobs"] == 0


def test_clear_says_so_when_a_tier_does_not_let_go() -> None:
    class Stubborn(MemoryTier):
        def clear(self, namespace: bytes | None = None) -> int:
            return 0

    pool = Pool("nhd", 40)
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[Stubborn()]) as engine:
        engine.store(tokens_of(CHUNK), pool.kv, scattered(CHUNK, pool))
        engine.flush()
        with pytest.raises(TierError, match="1 objects are still on tier 'memory'"):
            engine.clear()


def test_prefetch_brings_a_disk_hit_into_dram(tmp_path: Path) -> None:
    tokens = tokens_of(4 * CHUNK)
    pool = Pool("nhd", 40)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))
        engine.flush()
    with CacheEngine(config, tiny_spec()) as engine:
        with engine.lookup(tokens) as hit:
            engine.prefetch(hit)
            assert engine._driver.drain(30, "prefetch")
        with engine.lookup(tokens) as hit:
            assert hit.by_tier == {"dram": 4 * CHUNK}


@pytest.mark.parametrize("skip", [0, 1, CHUNK, 2 * CHUNK + 3, 3 * CHUNK])
def test_what_the_engine_has_already_is_neither_fetched_nor_loaded(tmp_path: Path, skip: int) -> None:
    tokens = tokens_of(4 * CHUNK)
    pool = Pool("nhd", 40)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))
        engine.flush()
    rest = 4 - skip // CHUNK
    with CacheEngine(config, tiny_spec()) as engine:
        with engine.lookup(tokens) as hit:
            engine.prefetch(hit, skip=skip)
            assert engine._driver.drain(30, "prefetch")
            [arena] = engine._plane.arenas()
            assert arena["ready"] == rest
        with engine.lookup(tokens) as hit:
            slots = scattered(4 * CHUNK, pool)
            slots[:skip] = -1
            assert engine.retrieve(hit, pool.kv, slots, skip=skip) == 4 * CHUNK
        moved = engine.stats()['lmcache_moved_bytes_total{src="dram",dst="engine"}']
        assert moved == rest * tiny_spec().object_bytes(0, CHUNK)


class TestWrongCalls:
    """Each raises a typed error that contains the value, before anything is copied."""

    @pytest.fixture
    def engine(self) -> CacheEngine:
        with CacheEngine(tiny_config(), tiny_spec()) as engine:
            yield engine

    @pytest.mark.parametrize(
        ("slots", "message"),
        [
            (torch.full((2 * CHUNK,), 10**6), "1000000"),
            (torch.full((2 * CHUNK,), -2), "-2"),
            (torch.arange(CHUNK), str(CHUNK)),
            (torch.zeros(2 * CHUNK), "int"),
            (torch.arange(2 * CHUNK).view(2, -1), "shape"),
            ({1: torch.arange(2 * CHUNK)}, "group 0"),
        ],
    )
    def test_slots(self, engine: CacheEngine, slots: object, message: str) -> None:
        pool = Pool("packed", 40)
        with pytest.raises(SlotError, match=message):
            engine.store(tokens_of(2 * CHUNK), pool.kv, slots)
        assert engine.lookup(tokens_of(2 * CHUNK)).tokens == 0

    def test_duplicate_destination_slots(self, engine: CacheEngine) -> None:
        pool = Pool("packed", 40)
        engine.store(tokens_of(2 * CHUNK), pool.kv, scattered(2 * CHUNK, pool))
        before = pool.snapshot()
        with engine.lookup(tokens_of(2 * CHUNK)) as hit:
            twice = torch.arange(2 * CHUNK)
            twice[5] = 4
            with pytest.raises(SlotError, match="4"):
                engine.retrieve(hit, pool.kv, twice)
        assert all(torch.equal(a, b) for a, b in zip(before, pool.snapshot(), strict=True))

    def test_tokens(self, engine: CacheEngine) -> None:
        pool = Pool("packed", 40)
        for bad in ([-1] * CHUNK, [2**32] * CHUNK, torch.zeros(CHUNK), [1.5] * CHUNK):
            with pytest.raises(TokenError):
                engine.store(bad, pool.kv, torch.arange(CHUNK))
            with pytest.raises(TokenError):
                engine.lookup(bad)

    @pytest.mark.parametrize(
        "tensors",
        [
            [bits((10, HEADS, 4, 2 * DIM), torch.float16, 0)] * LAYERS,  # another dtype
            [bits((10, HEADS, 4, 2 * DIM), torch.bfloat16, 0)] * (LAYERS - 1),  # a layer is missing
            [bits((10, HEADS + 1, 4, 2 * DIM), torch.bfloat16, 0)] * LAYERS,  # another head count
            [bits((10, HEADS, 4, DIM), torch.bfloat16, 0)] * LAYERS,  # V is missing
            [bits((10, HEADS, 4), torch.bfloat16, 0)] * LAYERS,  # a dimension is missing
            [torch.empty((10, HEADS, 4, 2 * DIM), dtype=torch.bfloat16, device="meta")] * LAYERS,  # no memory at all
        ],
    )
    def test_tensors_that_contradict_the_spec(self, engine: CacheEngine, tensors: list[torch.Tensor]) -> None:
        kv = PagedKV(tensors, Layout.parse("block head slot (kv dim)", block_tokens=4))
        with pytest.raises((LayoutError, SpecError)):
            engine.store(tokens_of(CHUNK), kv, torch.arange(CHUNK))

    def test_impossible_places_and_sizes(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(LMCacheError, match="is a file"):
            tiny_config(disk_path=tmp_path / "file")
        with pytest.raises(TierError, match="/proc/nowhere"):
            CacheEngine(tiny_config(disk_path="/proc/nowhere", strict=True), tiny_spec())
        with CacheEngine(tiny_config(disk_path="/proc/nowhere"), tiny_spec()) as engine:
            assert engine.stats()['lmcache_failures_total{op="open",reason="disk"}'] == 1
        with pytest.raises(LMCacheError, match="dram_bytes"):
            tiny_config(dram_bytes=1 << 60)


def test_a_good_copy_is_written_after_the_damaged_one_is_removed() -> None:
    """In the other order, the write would keep the damaged copy and the removal would delete it: the tier would be empty."""

    class Slow(FaultyTier):
        def __init__(self) -> None:
            super().__init__()
            self.may_delete = threading.Event()

        def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
            self.may_delete.wait(30)
            return super().delete(ids, deadline=deadline)

    tier, pool = Slow(), Pool("packed", 40, seed=1)
    tokens, slots = tokens_of(4 * CHUNK), scattered(4 * CHUNK, pool, seed=3)
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        engine.store(tokens, pool.kv, slots)
        assert engine.flush()
    for id in list(tier.contents()):
        tier.contents()[id] = b"hello"
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        with engine.lookup(tokens) as hit:
            assert engine.retrieve(hit, Pool("packed", 40).kv, slots) == 0
        assert engine.store(tokens, pool.kv, slots) == 4 * CHUNK
        assert not engine.flush(timeout=0.2), "the removal hangs, so nothing is written yet"
        tier.may_delete.set()
        assert engine.flush()
        assert len(tier.contents()) == 4
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine, engine.lookup(tokens) as hit:
        target = Pool("packed", 40, seed=2)
        assert engine.retrieve(hit, target.kv, slots) == 4 * CHUNK
        assert target.sequence(slots) == pool.sequence(slots)


def test_lookups_are_recorded_for_the_simulator(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    tokens = tokens_of(2 * CHUNK + 1)
    with CacheEngine(tiny_config(record_trace=str(path)), tiny_spec()) as engine:
        for length in (2 * CHUNK + 1, CHUNK):
            engine.lookup(tokens[:length]).release()
    trace = read_traces([path])
    assert trace.chunk_tokens == CHUNK
    assert [(request.tokens, list(request.blocks)) for request in trace] == [(2 * CHUNK + 1, [0, 1]), (CHUNK, [0])]


def test_a_retrieve_asked_layer_by_layer_is_complete_or_false() -> None:
    tokens, pool = tokens_of(2 * CHUNK), Pool("nhd", 40, seed=1)
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        engine.store(tokens, pool.kv, scattered(2 * CHUNK, pool))
        with engine.lookup(tokens) as hit, pytest.warns(DeprecationWarning, match="call retrieve"):
            load = engine.retrieve_layers(hit, pool.kv, torch.arange(2 * CHUNK))
        assert load.wait(0)
        assert load.finish() == 2 * CHUNK
        hit = engine.lookup(tokens)
        engine.clear()
        with pytest.warns(DeprecationWarning, match="call retrieve"):
            load = engine.retrieve_layers(hit, pool.kv, torch.arange(2 * CHUNK))
        assert not load.wait(0)
        assert load.finish() == 0


# ---------------------------------------------------------------- receipts


class Full(MemoryTier):
    """Refuses the first `refused` writes, as a full disk does."""

    refused = 0

    def write(self, writes, *, deadline=None):  # type: ignore[no-untyped-def]
        results = super().write(writes, deadline=deadline)
        if self.refused > 0:
            self.refused -= 1
            for write in writes:
                self.delete([write.id])
            return [Result(Status.FULL) for _ in writes]
        return results


def test_flush_writes_again_what_failed_and_counts_what_became_of_it() -> None:
    tokens, pool, tier = tokens_of(4 * CHUNK), Pool("nhd", 40, seed=1), Full()
    tier.refused = 2
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))
        result = engine.flush()
        assert result
        assert (result.written, result.present, result.dropped) == (4, 0, {})
        assert len(list(tier.scan())) == 4
        assert engine.flush() == FlushResult()


def test_what_a_flush_could_not_write_is_written_by_the_next_one() -> None:
    tokens, pool, tier = tokens_of(4 * CHUNK), Pool("nhd", 40, seed=1), Full()
    tier.refused = 1 << 30
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))
        assert not engine.flush()
        assert not engine.flush(), "they are on no tier still"
        tier.refused = 0
        assert engine.flush().written == 4
        assert len(list(tier.scan())) == 4


def test_a_good_object_that_could_not_be_checked_is_not_deleted() -> None:
    class Shared(MemoryTier):
        shared, name, broken = True, "remote", False

        def read_into(self, reads, *, deadline=None):  # type: ignore[no-untyped-def]
            if self.broken and all(r.length == 1 for read in reads for r in read.ranges):
                return [Result(Status.FAILED, 0, "connection reset") for _ in reads]
            return super().read_into(reads, deadline=deadline)

        def write(self, writes, *, deadline=None):  # type: ignore[no-untyped-def]
            failed = [Result(Status.FAILED, 0, "connection reset") for _ in writes]
            return failed if self.broken else super().write(writes, deadline=deadline)

        def close(self) -> None:
            """It is used again."""

    tokens, pool, tier = tokens_of(2 * CHUNK), Pool("nhd", 40, seed=1), Shared()
    for broken in (False, True):
        tier.broken = broken
        with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
            engine.store(tokens, pool.kv, scattered(2 * CHUNK, pool))
            assert bool(engine.flush()) is not broken
        assert len(list(tier.scan())) == 2


def test_closing_does_not_wait_for_a_tier_that_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.engine.CLOSE_S", 0.5)
    tokens, pool, go = tokens_of(4 * CHUNK), Pool("nhd", 40, seed=1), threading.Event()

    class Hung(MemoryTier):
        def write(self, writes, *, deadline=None):  # type: ignore[no-untyped-def]
            go.wait(30)
            return super().write(writes, deadline=deadline)

    engine = CacheEngine(tiny_config(), tiny_spec(), tiers=[Hung()])
    engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))
    closing = threading.Thread(target=engine.close)
    closing.start()
    while closing.is_alive():  # loads from memory are no progress of the tier
        with engine.lookup(tokens) as hit:
            engine.retrieve(hit, pool.kv, torch.arange(hit.tokens))
        closing.join(0.01)
        if go.is_set():
            break
    assert not closing.is_alive()
    assert engine.store(tokens_of(CHUNK, seed=9), pool.kv, torch.arange(CHUNK)) == 0, "closed"
    go.set()


def test_flush_is_false_if_an_object_is_on_no_tier() -> None:
    tokens, pool, tier = tokens_of(4 * CHUNK), Pool("nhd", 40, seed=1), Full()
    tier.refused = 1 << 30
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as engine:
        engine.store(tokens, pool.kv, scattered(4 * CHUNK, pool))
        result = engine.flush()
        assert not result
        assert result.dropped == {"full": 4}


def test_what_left_a_shared_tier_is_written_again(tmp_path: Path) -> None:
    tokens, pool = tokens_of(4 * CHUNK), Pool("nhd", 400, seed=1)
    slots = scattered(4 * CHUNK, pool)
    config = tiny_config(
        disk_path=tmp_path, dram_bytes=8 * tiny_spec().object_bytes(0, CHUNK), admission="all", policy="lru"
    )
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, pool.kv, slots)
        assert engine.flush()
        DiskTier(tmp_path).clear()  # as another process does
        for seed in range(5, 10):  # until it has left DRAM, too
            engine.store(tokens_of(4 * CHUNK, seed=seed), pool.kv, slots)
        assert engine.flush()
        assert engine.store(tokens, pool.kv, slots) == 4 * CHUNK
        assert engine.flush()
    with CacheEngine(config, tiny_spec()) as fresh, fresh.lookup(tokens) as hit:
        assert hit.tokens == 4 * CHUNK


def test_a_damaged_object_on_a_shared_tier_is_written_again(tmp_path: Path) -> None:
    tokens, pool, target = tokens_of(4 * CHUNK), Pool("nhd", 400, seed=1), Pool("nhd", 400, seed=2)
    slots, config = scattered(4 * CHUNK, pool), tiny_config(disk_path=tmp_path, admission="all")
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, pool.kv, slots)
        assert engine.flush().written == 4
    for file in tmp_path.rglob("*.safetensors"):  # as after a power cut: the name is there, its bytes are not
        with file.open("r+b") as bytes_of:
            bytes_of.write(bytes(4096))
    with CacheEngine(config, tiny_spec()) as engine:
        assert engine.store(tokens, pool.kv, slots) == 4 * CHUNK
        assert engine.flush(durable=True).written == 4
    with CacheEngine(config, tiny_spec()) as engine:
        assert engine.store(tokens, pool.kv, slots) == 4 * CHUNK
        assert engine.flush().present == 4
    with CacheEngine(config, tiny_spec()) as fresh, fresh.lookup(tokens) as hit:
        assert fresh.retrieve(hit, target.kv, slots) == 4 * CHUNK
    assert target.sequence(slots) == pool.sequence(slots)


def test_a_hit_of_another_engine_is_refused() -> None:
    tokens, pool = tokens_of(2 * CHUNK), Pool("nhd", 40, seed=1)
    slots = scattered(2 * CHUNK, pool)
    with CacheEngine(tiny_config(), tiny_spec()) as one, CacheEngine(tiny_config(), tiny_spec()) as other:
        for engine in (one, other):
            engine.store(tokens, pool.kv, slots)
        with one.lookup(tokens) as hit, other.lookup(tokens):
            with pytest.raises(SlotError, match="another engine"):
                other.retrieve(hit, pool.kv, slots)
            assert one.retrieve(hit, pool.kv, slots) == 2 * CHUNK


def test_a_tenants_names_are_not_forgotten_while_objects_are_held_under_them() -> None:
    tokens, pool = tokens_of(2 * CHUNK), Pool("nhd", 40, seed=1)
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        engine.store(tokens, pool.kv, scattered(2 * CHUNK, pool), salt="alice", lora="a" * 64)
        for i in range((1 << 16) + 5):
            engine.namespace(salt=f"s{i}")
        assert engine.clear("alice") == 2
        with engine.lookup(tokens, salt="alice", lora="a" * 64) as hit:
            assert hit.tokens == 0


def test_a_tier_that_cannot_tell_its_size_costs_nothing_but_the_estimate() -> None:
    class Rude(MemoryTier):
        def used_bytes(self) -> int:
            raise ConnectionError("gone")

    tokens, pool = tokens_of(2 * CHUNK), Pool("nhd", 40, seed=1)
    with CacheEngine(tiny_config(admission="adaptive"), tiny_spec(), tiers=[Rude(1 << 20)]) as engine:
        engine.store(tokens, pool.kv, scattered(2 * CHUNK, pool))
        assert engine.flush()
        assert engine.stats()['lmcache_failures_total{op="measure",reason="memory"}'] >= 1
        engine.clear()


@pytest.mark.parametrize("known", [0, CHUNK], ids=["stored together", "loaded together"])
def test_objects_that_are_not_adjacent_keep_their_slots(tmp_path: Path, known: int) -> None:
    tokens, source, target = torch.arange(4 * CHUNK), Pool("packed", 40, seed=1), Pool("packed", 40)
    slots = scattered(len(tokens), source)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as other:
        other.store(tokens, source.kv, slots)
        other.flush()
    with CacheEngine(config, tiny_spec()) as engine:
        engine.lookup(tokens).release()
        hole = slots.clone()
        hole[CHUNK : 2 * CHUNK] = -1  # the second chunk is on disk alone
        assert engine.store(tokens[:known], source.kv, hole) == known
        assert engine.store(tokens, source.kv, hole) == 3 * CHUNK - known
        with engine.lookup(tokens) as hit:
            assert hit.by_tier == {"dram": 3 * CHUNK, "disk": CHUNK}
            assert engine.retrieve(hit, target.kv, slots) == len(tokens)
    assert target.sequence(slots) == source.sequence(slots)


class SlowCopier(HostCopier):
    """Begins a copy to the engine, and ends it when `go` is set."""

    def __init__(self) -> None:
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()

    def load(self, *args: Any, **kwargs: Any) -> None:
        self.begun.set()
        self.go.wait(30)
        super().load(*args, **kwargs)
        self.ended.set()


def test_a_late_load_does_not_return_while_a_copy_is_under_way() -> None:
    tokens, source, target = torch.arange(2 * CHUNK), Pool("packed", 40, seed=1), Pool("packed", 40)
    slots = scattered(len(tokens), source)
    tier, copier = FaultyTier(), SlowCopier()
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[tier]) as writer:
        writer.store(tokens, source.kv, slots)
        writer.flush()
    with CacheEngine(tiny_config(load_timeout_s=1.0), tiny_spec(), tiers=[tier]) as engine:
        engine._rank.transfer._open_copier = lambda device: copier

        def go_on_after_the_deadline() -> None:
            copier.begun.wait(30)
            time.sleep(3.5)
            copier.go.set()

        threading.Thread(target=go_on_after_the_deadline, daemon=True).start()
        with engine.lookup(tokens) as hit:
            engine.retrieve(hit, target.kv, slots)
        assert copier.ended.is_set() or not copier.begun.is_set(), "engine memory was written after retrieve returned"
