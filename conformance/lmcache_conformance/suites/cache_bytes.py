"""A cache returns the bits that were stored: into any layout, with all side state, after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache import Layout, PagedKV
from lmcache.spec import KVSpec, LayerGroup, Numerics, Plane, trailing
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.fresh_interpreter import in_new_process
from lmcache_conformance.labs.kv_pool import (
    CHUNK,
    DIM,
    HEADS,
    KINDS,
    LAYERS,
    Pool,
    bits,
    equal_bits,
    scattered,
    tiny_config,
    tiny_spec,
)
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.cache_factory import CacheFactory, tokens_of

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int8)


class CacheBytesTests(CacheFactory):
    """Bytes, restart."""

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_layout_reads_what_any_other_wrote_and_no_other_slot_changes(self, dtype: torch.dtype) -> None:
        tokens = tokens_of(3 * CHUNK + 5)
        every = dtype == DTYPES[0]  # the pairing of layouts does not depend on the element size
        for writer in KINDS if every else KINDS[:1]:
            source = Pool(writer, 40, dtype, seed=1)
            src = scattered(len(tokens), source, seed=3)
            expected = source.sequence(src[: 3 * CHUNK])
            for reader in KINDS if every else KINDS[:2]:
                target = Pool(reader, 40, dtype, seed=2)
                dst = scattered(3 * CHUNK, target, seed=4)
                untouched = torch.tensor([s for s in range(target.slots) if s not in set(dst.tolist())])
                before = target.sequence(untouched)
                with self.open_cache(tiny_config(), tiny_spec(dtype)) as cache:
                    assert cache.store(tokens, source.kv, src) == 3 * CHUNK
                    with cache.lookup(tokens) as hit:
                        assert (hit.tokens, hit.by_tier) == (3 * CHUNK, {"dram": 3 * CHUNK})
                        assert cache.retrieve(hit, target.kv, dst) == 3 * CHUNK
                assert target.sequence(dst) == expected, f"{writer} → {reader}: the loaded bits are wrong"
                assert target.sequence(untouched) == before, f"{writer} → {reader}: another slot changed"

    @level(Level.BYTES)
    def test_the_same_hit_twice_gives_the_same_bits_twice(self) -> None:
        tokens = tokens_of(2 * CHUNK)
        source, target = Pool("packed", 40, seed=1), Pool("nhd", 40, seed=2)
        slots = scattered(2 * CHUNK, source)
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            cache.store(tokens, source.kv, slots)
            for seed in range(3):
                dst = scattered(2 * CHUNK, target, seed=seed)
                with cache.lookup(tokens) as hit:
                    assert cache.retrieve(hit, target.kv, dst) == 2 * CHUNK
                assert target.sequence(dst) == source.sequence(slots), f"load {seed} differs"

    @level(Level.BYTES)
    def test_the_source_may_be_overwritten_as_soon_as_store_returns(self, place: Path) -> None:
        tokens = tokens_of(8 * CHUNK)
        pool = Pool("packed", 64, seed=1)
        slots = scattered(8 * CHUNK, pool)
        expected = pool.sequence(slots)
        config = tiny_config(disk_path=place)
        with self.open_cache(config, tiny_spec()) as cache:
            cache.store(tokens, pool.kv, slots)
            for tensor in pool.tensors:
                tensor.view(torch.uint8).fill_(0)
            cache.flush()
        with self.open_cache(config, tiny_spec()) as cache, cache.lookup(tokens) as hit:
            assert cache.retrieve(hit, pool.kv, slots) == 8 * CHUNK
        assert pool.sequence(slots) == expected, "store kept reading the source after it had returned"

    @level(Level.BYTES)
    def test_a_slot_of_minus_one_is_neither_read_nor_written(self) -> None:
        """An engine's placeholder block must be neither stored nor loaded into."""
        tokens = tokens_of(4 * CHUNK)
        source, target = Pool("nhd", 40, seed=1), Pool("packed", 40, seed=2)
        src = scattered(4 * CHUNK, source)
        holed = src.clone()
        holed[2 * CHUNK + 3] = -1
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            cache.store(tokens, source.kv, holed)
            with cache.lookup(tokens) as hit:
                assert hit.tokens == 2 * CHUNK, "a chunk with a slot that is not resident was stored"
            cache.store(tokens, source.kv, src)
            dst = scattered(4 * CHUNK, target, seed=5)
            partial = dst.clone()
            partial[: CHUNK + 7] = -1
            before = target.snapshot()
            wanted = Pool("packed", 40, seed=2)
            for slot, at in zip(partial.tolist(), range(4 * CHUNK), strict=True):
                if slot >= 0:
                    wanted.put(slot, torch.stack([torch.stack(source.views(i, int(src[at]))) for i in range(LAYERS)]))
            with cache.lookup(tokens) as hit:
                assert cache.retrieve(hit, target.kv, partial) == 4 * CHUNK
            same = all(torch.equal(a, b) for a, b in zip(target.snapshot(), wanted.snapshot(), strict=True))
            assert same, "bytes outside the given slots changed"
            assert any(not torch.equal(a, b) for a, b in zip(before, target.snapshot(), strict=True))

    @level(Level.BYTES)
    def test_a_longer_prompt_hits_exactly_its_stored_prefix(self) -> None:
        tokens = tokens_of(6 * CHUNK)
        pool, target = Pool("nhd", 40, seed=1), Pool("nhd", 40, seed=2)
        slots = scattered(6 * CHUNK, pool)
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            cache.store(tokens[: 3 * CHUNK + 2], pool.kv, slots[: 3 * CHUNK + 2])
            with cache.lookup(tokens) as hit:
                assert (hit.tokens, hit.stop) == (3 * CHUNK, "absent")
                assert cache.retrieve(hit, target.kv, slots) == 3 * CHUNK
            held = slots[: 3 * CHUNK]
            assert target.sequence(held) == pool.sequence(held), "the loaded KV is not that of the prompt's prefix"
            with cache.lookup(tokens, max_tokens=3 * CHUNK - 1) as hit:
                assert (hit.tokens, hit.stop) == (2 * CHUNK, "max_tokens")
            changed = tokens.clone()
            changed[CHUNK + 1] += 1
            with cache.lookup(changed) as hit:
                assert hit.tokens == CHUNK
            with cache.lookup(tokens[CHUNK : 3 * CHUNK]) as hit:
                assert hit.tokens == 0, "a suffix of a stored prompt must not hit"

    @level(Level.BYTES)
    def test_a_hit_restores_the_side_state_of_every_group(self) -> None:
        """A sliding window is part of the hit: without it the engine would decode from garbage."""
        planes = (Plane("k", "bfloat16", DIM), Plane("v", "bfloat16", DIM))
        groups = (
            LayerGroup("full", (0, 2), planes, HEADS),
            LayerGroup("sliding", (1,), planes, HEADS, trailing(CHUNK + 3)),
        )
        spec = KVSpec.of_groups("hybrid", groups, Numerics(engine="test"))
        tokens = tokens_of(6 * CHUNK)
        source, raw = _hybrid(1)
        target, got = _hybrid(1000)
        full, window = torch.arange(6 * CHUNK), torch.arange(6 * CHUNK) + 7
        holed = window.clone()
        holed[: 3 * CHUNK] = -1  # outside the window
        with self.open_cache(tiny_config(), spec) as cache:
            cache.store(tokens, source, {0: full, 1: holed})
            with cache.lookup(tokens, max_tokens=4 * CHUNK) as hit:
                assert hit.tokens == 0, "a hit, although the window before its end was never stored"
            with cache.lookup(tokens) as hit:
                assert hit.tokens == 6 * CHUNK
                assert cache.retrieve(hit, target, {0: full, 1: window}) == 6 * CHUNK
        for plane in "kv":
            for layer in range(2):
                assert equal_bits(got[0][plane][layer][full], raw[0][plane][layer][full]), (
                    f"full group, {plane}, layer {layer}"
                )
            held = window[4 * CHUNK :]  # the chunks that cover the last CHUNK + 3 tokens
            assert equal_bits(got[1][plane][0][held], raw[1][plane][0][held]), f"the window's {plane} was not restored"

    # ---------------------------------------------------------------- restart

    @level(Level.RESTART)
    @pytest.mark.parametrize("order", ["canonical", "native"])
    def test_a_fresh_cache_reads_from_disk_alone_into_any_layout(self, place: Path, order: str) -> None:
        tokens = tokens_of(4 * CHUNK)
        for number, (writer, reader) in enumerate((w, r) for w in KINDS for r in KINDS):
            source, target = Pool(writer, 40, seed=1), Pool(reader, 40, seed=2)
            src, dst = scattered(4 * CHUNK, source, seed=3), scattered(4 * CHUNK, target, seed=4)
            config = tiny_config(disk_path=place / str(number), disk_order=order)
            with self.open_cache(config, tiny_spec()) as cache:
                cache.store(tokens, source.kv, src)
                assert cache.flush(durable=True)
            with self.open_cache(config, tiny_spec()) as cache:
                with cache.lookup(tokens) as hit:
                    assert hit.by_tier == {"disk": 4 * CHUNK}, f"{writer} → {reader}: no full hit in a new cache"
                    assert cache.retrieve(hit, target.kv, dst) == 4 * CHUNK
                with cache.lookup(tokens) as again:
                    assert again.by_tier == {"dram": 4 * CHUNK}, "loaded chunks were not kept in DRAM"
                    assert cache.retrieve(again, target.kv, dst) == 4 * CHUNK
            assert target.sequence(dst) == source.sequence(src), (
                f"{writer} → {reader}, {order}: the loaded bits are wrong"
            )

    # ---------------------------------------------------------------- another process

    @level(Level.RESTART)
    def test_another_process_finds_and_reads_what_was_flushed(self, place: Path) -> None:
        stored = self.store_somewhere(str(place))
        found, same = in_new_process(self, "find_there", str(place))
        assert found == stored, f"another process hits {found} of {stored} tokens"
        assert same, "another process loaded wrong bits"

    def store_somewhere(self, place: str) -> int:
        """Stores one prompt; returns the number of tokens stored."""
        pool = Pool("packed", 40, seed=1)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            stored = cache.store(tokens_of(4 * CHUNK), pool.kv, scattered(4 * CHUNK, pool), salt="a", lora="l")
            assert cache.flush()
        return stored

    def find_there(self, place: str) -> tuple[int, bool]:
        """Returns the hit's tokens for that prompt, and whether the loaded bits are correct. Runs in another process."""
        source, target = Pool("packed", 40, seed=1), Pool("nhd", 40, seed=9)
        slots = scattered(4 * CHUNK, source)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            with cache.lookup(tokens_of(4 * CHUNK), salt="a", lora="l") as hit:
                loaded = cache.retrieve(hit, target.kv, slots)
            return hit.tokens, target.sequence(slots[:loaded]) == source.sequence(slots[:loaded])


def _hybrid(seed: int) -> tuple[PagedKV, dict[int, dict[str, list[torch.Tensor]]]]:
    """Returns the `PagedKV` of two full layers and one sliding-window layer, and its tensors."""
    layout = Layout.parse({"k": "slot head dim", "v": "slot head dim"})
    tensors = {
        g: {
            p: [bits((200, HEADS, DIM), torch.bfloat16, seed + g * 50 + i * 20 + n) for n in range(2 - g)]
            for i, p in enumerate("kv")
        }
        for g in range(2)
    }
    return PagedKV(tensors, {0: layout, 1: layout}), tensors
