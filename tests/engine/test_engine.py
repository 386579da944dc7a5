"""The whole cache in one process: what was stored comes back bit for bit, or it is a miss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine, Layout, PagedKV
from lmcache.errors import LayoutError, LMCacheError, SlotError, SpecError, TierError, TokenError
from lmcache.spec import KVSpec
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.kvlab import CHUNK, DIM, HEADS, KINDS, LAYERS, Pool, bits, scattered, tiny_config, tiny_spec


def tokens_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50_000, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("reader", KINDS)
def test_any_layout_reads_what_any_other_wrote_and_no_other_slot_changes(
    writer: str, reader: str, dtype: torch.dtype
) -> None:
    tokens = tokens_of(3 * CHUNK + 5)
    source, target = Pool(writer, 40, dtype, seed=1), Pool(reader, 40, dtype, seed=2)
    src, dst = scattered(len(tokens), source, seed=3), scattered(3 * CHUNK, target, seed=4)
    expected = source.sequence(src[: 3 * CHUNK])
    untouched = [s for s in range(target.slots) if s not in set(dst.tolist())]
    before = target.sequence(torch.tensor(untouched))
    with CacheEngine(tiny_config(), tiny_spec(dtype)) as engine:
        assert engine.store(tokens, source.kv, src) == 3 * CHUNK
        with engine.lookup(tokens) as hit:
            assert (hit.tokens, hit.by_tier) == (3 * CHUNK, {"dram": 3 * CHUNK})
            assert engine.retrieve(hit, target.kv, dst) == 3 * CHUNK
    assert target.sequence(dst) == expected
    assert target.sequence(torch.tensor(untouched)) == before


@pytest.mark.parametrize("order", ["canonical", "native"])
@pytest.mark.parametrize(("writer", "reader"), [("packed", "packed"), ("packed", "nhd"), ("rows", "packed")])
def test_a_new_engine_reads_from_disk_alone(tmp_path: Path, order: str, writer: str, reader: str) -> None:
    tokens = tokens_of(4 * CHUNK)
    source, target = Pool(writer, 40, seed=1), Pool(reader, 40, seed=2)
    src, dst = scattered(4 * CHUNK, source, seed=3), scattered(4 * CHUNK, target, seed=4)
    config = tiny_config(disk_path=tmp_path, disk_order=order)
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, source.kv, src)
        assert engine.flush(durable=True)
    with CacheEngine(config, tiny_spec()) as engine:
        with engine.lookup(tokens) as hit:
            assert hit.by_tier == {"disk": 4 * CHUNK}
            assert engine.retrieve(hit, target.kv, dst) == 4 * CHUNK
        with engine.lookup(tokens) as again:
            assert again.by_tier == {"dram": 4 * CHUNK}, "what was read is kept in DRAM"
    assert target.sequence(dst) == source.sequence(src)


def test_a_hit_on_disk_may_be_larger_than_dram(tmp_path: Path) -> None:
    tokens = tokens_of(20 * CHUNK)
    source, target = Pool("packed", 100, seed=1), Pool("packed", 100, seed=2)
    slots = scattered(20 * CHUNK, source, seed=3)
    with CacheEngine(tiny_config(disk_path=tmp_path), tiny_spec()) as engine:
        engine.store(tokens, source.kv, slots)
        engine.flush()
    eight = 8 * tiny_spec().object_bytes(0, CHUNK)
    with CacheEngine(tiny_config(dram_bytes=eight, disk_path=tmp_path), tiny_spec()) as engine:
        for _ in range(2):
            with engine.lookup(tokens) as hit:
                assert hit.tokens == 20 * CHUNK
                assert engine.retrieve(hit, target.kv, slots) == 20 * CHUNK
    assert target.sequence(slots) == source.sequence(slots)


def test_without_dram_everything_passes_through_to_the_disk(tmp_path: Path) -> None:
    tokens = tokens_of(20 * CHUNK)
    pool = Pool("packed", 100, seed=1)
    with CacheEngine(tiny_config(dram_bytes=0, disk_path=tmp_path), tiny_spec()) as engine:
        assert engine.store(tokens, pool.kv, scattered(20 * CHUNK, pool)) == 20 * CHUNK
    assert len(list(tmp_path.rglob("*.safetensors"))) == 20


def test_the_source_may_be_overwritten_as_soon_as_store_returns(tmp_path: Path) -> None:
    tokens = tokens_of(8 * CHUNK)
    pool = Pool("packed", 64, seed=1)
    slots = scattered(8 * CHUNK, pool)
    expected = pool.sequence(slots)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, pool.kv, slots)
        for tensor in pool.tensors:
            tensor.view(torch.uint8).fill_(0)
        engine.flush()
    with CacheEngine(config, tiny_spec()) as engine, engine.lookup(tokens) as hit:
        assert engine.retrieve(hit, pool.kv, slots) == 8 * CHUNK
    assert pool.sequence(slots) == expected


def test_a_longer_prompt_hits_its_stored_prefix_and_says_why_it_ends() -> None:
    tokens = tokens_of(6 * CHUNK)
    pool = Pool("nhd", 40)
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        engine.store(tokens[: 3 * CHUNK + 2], pool.kv, scattered(3 * CHUNK + 2, pool))
        with engine.lookup(tokens) as hit:
            assert (hit.tokens, hit.stop) == (3 * CHUNK, "absent")
        with engine.lookup(tokens, max_tokens=3 * CHUNK - 1) as hit:
            assert (hit.tokens, hit.stop) == (2 * CHUNK, "max_tokens")
        changed = tokens.clone()
        changed[CHUNK + 1] += 1
        with engine.lookup(changed) as hit:
            assert hit.tokens == CHUNK


def test_tenants_loras_and_weights_never_cross_and_a_known_prompt_under_another_salt_is_named() -> None:
    tokens = tokens_of(2 * CHUNK)
    pool = Pool("nhd", 40)
    slots = scattered(2 * CHUNK, pool)
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        engine.store(tokens, pool.kv, slots, salt="a")
        for other in ({"salt": "b"}, {}, {"salt": "a", "lora": "x"}):
            with engine.lookup(tokens, **other) as hit:
                assert (hit.tokens, hit.stop) == (0, "salt")
        assert engine.lookup(tokens, salt="a").tokens == 2 * CHUNK
        engine.set_weights_version(1)
        assert engine.lookup(tokens, salt="a").tokens == 0
        engine.set_weights_version("")
        assert engine.lookup(tokens, salt="a").tokens == 2 * CHUNK


def test_clear_really_clears_every_tier_of_one_tenant_or_all(tmp_path: Path) -> None:
    tokens = tokens_of(2 * CHUNK)
    pool = Pool("nhd", 40)
    slots = scattered(2 * CHUNK, pool)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as engine:
        for salt in ("a", "b"):
            engine.store(tokens, pool.kv, slots, salt=salt)
        assert engine.clear(salt="a") > 0
        assert engine.lookup(tokens, salt="a").tokens == 0
        assert engine.lookup(tokens, salt="b").tokens == 2 * CHUNK
    with CacheEngine(config, tiny_spec()) as engine:
        assert engine.lookup(tokens, salt="a").tokens == 0
        assert engine.lookup(tokens, salt="b").tokens == 2 * CHUNK
        engine.clear()
        assert engine.lookup(tokens, salt="b").tokens == 0
    assert not list(tmp_path.rglob("*.safetensors"))


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


def test_clear_says_so_when_a_tier_does_not_let_go() -> None:
    class Stubborn(MemoryTier):
        def clear(self, namespace: bytes | None = None) -> int:
            return 0

    pool = Pool("nhd", 40)
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[Stubborn()]) as engine:
        engine.store(tokens_of(CHUNK), pool.kv, scattered(CHUNK, pool))
        with pytest.raises(TierError, match="1 objects are still on tier 'memory'"):
            engine.clear()


def test_layer_by_layer_every_layer_is_complete_when_it_is_announced(tmp_path: Path) -> None:
    tokens = tokens_of(4 * CHUNK)
    source, target = Pool("packed", 40, seed=1), Pool("packed", 40, seed=2)
    src, dst = scattered(4 * CHUNK, source, seed=3), scattered(4 * CHUNK, target, seed=4)
    expected = source.sequence(src)
    config = tiny_config(disk_path=tmp_path)
    with CacheEngine(config, tiny_spec()) as engine:
        engine.store(tokens, source.kv, src)
        engine.flush()
    with CacheEngine(config, tiny_spec()) as engine:
        for _tier in ("disk", "dram"):
            for tensor in target.tensors:
                tensor.view(torch.uint8).fill_(0)
            with engine.lookup(tokens) as hit:
                load = engine.retrieve_layers(hit, target.kv, dst)
                for layer in range(LAYERS):
                    assert load.wait(layer)
                    assert target.sequence(dst)[layer] == expected[layer]
                assert load.finish() == 4 * CHUNK


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
            assert engine._drain(30, "prefetch")
        with engine.lookup(tokens) as hit:
            assert hit.by_tier == {"dram": 4 * CHUNK}


def test_slots_marked_absent_are_neither_read_nor_written() -> None:
    tokens = tokens_of(4 * CHUNK)
    source, target = Pool("nhd", 40, seed=1), Pool("packed", 40, seed=2)
    src = scattered(4 * CHUNK, source)
    holed = src.clone()
    holed[2 * CHUNK + 3] = -1
    with CacheEngine(tiny_config(), tiny_spec()) as engine:
        engine.store(tokens, source.kv, holed)
        assert engine.lookup(tokens).tokens == 2 * CHUNK
        engine.store(tokens, source.kv, src)
        dst = scattered(4 * CHUNK, target, seed=5)
        partial = dst.clone()
        partial[: CHUNK + 7] = -1
        before = target.sequence(dst)
        with engine.lookup(tokens) as hit:
            assert engine.retrieve(hit, target.kv, partial) == 4 * CHUNK
        after, expected = target.sequence(dst), source.sequence(src)
        for layer in range(LAYERS):
            assert after[layer][: CHUNK + 7] == before[layer][: CHUNK + 7]
            assert after[layer][CHUNK + 7 :] == expected[layer][CHUNK + 7 :]


def test_a_full_cache_evicts_and_goes_on() -> None:
    pool = Pool("packed", 64, seed=1)
    slots = scattered(4 * CHUNK, pool)
    spec = tiny_spec()
    with CacheEngine(tiny_config(dram_bytes=12 * spec.object_bytes(0, CHUNK)), spec) as engine:
        for round_ in range(20):
            tokens = tokens_of(4 * CHUNK, seed=round_)
            assert engine.store(tokens, pool.kv, slots) == 4 * CHUNK
            with engine.lookup(tokens) as hit:
                assert hit.tokens == 4 * CHUNK
        with engine.lookup(tokens_of(4 * CHUNK, seed=0)) as hit:
            assert (hit.tokens, hit.stop) == (0, "evicted")


def test_a_leased_hit_survives_pressure() -> None:
    pool, target = Pool("packed", 64, seed=1), Pool("packed", 64, seed=2)
    slots = scattered(4 * CHUNK, pool)
    spec = tiny_spec()
    with CacheEngine(tiny_config(dram_bytes=12 * spec.object_bytes(0, CHUNK)), spec) as engine:
        engine.store(tokens_of(4 * CHUNK), pool.kv, slots)
        with engine.lookup(tokens_of(4 * CHUNK)) as hit:
            for round_ in range(1, 10):
                engine.store(tokens_of(4 * CHUNK, seed=round_), pool.kv, slots)
            assert engine.retrieve(hit, target.kv, slots) == 4 * CHUNK
        assert target.sequence(slots) == pool.sequence(slots)


class TestWrongCalls:
    """Each raises a typed error that names the value, before anything moved."""

    @pytest.fixture
    def engine(self) -> CacheEngine:
        with CacheEngine(tiny_config(), tiny_spec()) as engine:
            yield engine

    @pytest.mark.parametrize(
        ("slots", "says"),
        [
            (torch.full((2 * CHUNK,), 10**6), "1000000"),
            (torch.full((2 * CHUNK,), -2), "-2"),
            (torch.arange(CHUNK), str(CHUNK)),
            (torch.zeros(2 * CHUNK), "int"),
            (torch.arange(2 * CHUNK).view(2, -1), "shape"),
            ({1: torch.arange(2 * CHUNK)}, "group 0"),
        ],
    )
    def test_slots(self, engine: CacheEngine, slots: object, says: str) -> None:
        pool = Pool("packed", 40)
        with pytest.raises(SlotError, match=says):
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


def test_several_groups_with_a_sliding_window() -> None:
    from lmcache.spec import LayerGroup, Numerics, Plane, trailing

    planes = (Plane("k", "bfloat16", DIM), Plane("v", "bfloat16", DIM))
    groups = (
        LayerGroup("full", (0, 2), planes, HEADS),
        LayerGroup("sliding", (1,), planes, HEADS, trailing(CHUNK + 3)),
    )
    spec = KVSpec.of_groups("hybrid", groups, Numerics(engine="test"))
    layout = Layout.parse({"k": "slot head dim", "v": "slot head dim"})

    def kv(seed: int) -> tuple[PagedKV, dict[int, dict[str, list[torch.Tensor]]]]:
        tensors = {
            g: {
                p: [bits((200, HEADS, DIM), torch.bfloat16, seed + g * 50 + i * 20 + n) for n in range(2 - g)]
                for i, p in enumerate("kv")
            }
            for g in range(2)
        }
        return PagedKV(tensors, {0: layout, 1: layout}), tensors

    source, raw = kv(1)
    target, got = kv(1000)
    tokens = tokens_of(6 * CHUNK)
    full, window = torch.arange(6 * CHUNK), torch.arange(6 * CHUNK) + 7
    window[: 3 * CHUNK] = -1  # slid out
    with CacheEngine(tiny_config(), spec) as engine:
        engine.store(tokens, source, {0: full, 1: window})
        with engine.lookup(tokens) as hit:
            assert hit.tokens == 6 * CHUNK
            before = [t.clone().view(torch.uint8) for t in got[1]["k"]]
            assert engine.retrieve(hit, target, {0: full, 1: torch.arange(6 * CHUNK) + 7}) == 6 * CHUNK
        assert torch.equal(got[0]["k"][1][: 6 * CHUNK].view(torch.uint8), raw[0]["k"][1][: 6 * CHUNK].view(torch.uint8))
        held = slice(7 + 4 * CHUNK, 7 + 6 * CHUNK)
        assert torch.equal(got[1]["v"][0][held].view(torch.uint8), raw[1]["v"][0][held].view(torch.uint8))
        assert torch.equal(got[1]["k"][0].view(torch.uint8)[: 7 + 4 * CHUNK], before[0][: 7 + 4 * CHUNK])
        with engine.lookup(tokens, max_tokens=4 * CHUNK) as hit:
            assert (hit.tokens, hit.stop) == (0, "group:sliding"), "the window before token 64 was not kept"
