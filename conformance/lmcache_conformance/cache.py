"""What a whole cache must do: what was stored comes back bit for bit, or it is a miss.

    class TestMyCache(CacheTests):
        def open_cache(self, config, spec, tiers=None):
            return CacheEngine(config, spec, tiers=tiers)

The oracle is raw tensors by plain indexing (`kvlab.Pool`), raw files, and a fresh cache. Faults, pressure and threads are in
`cachefaults`, random histories in `cachemachine`.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from lmcache import CacheEngine, Config, Layout, PagedKV
from lmcache.keys import Extra
from lmcache.spec import KVSpec, LayerGroup, Numerics, Plane, trailing
from lmcache.tiers.base import Tier
from lmcache_conformance.contract import Level
from lmcache_conformance.elsewhere import elsewhere
from lmcache_conformance.kvlab import CHUNK, DIM, HEADS, KINDS, LAYERS, Pool, bits, scattered, tiny_config, tiny_spec
from lmcache_conformance.marks import level

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int8)


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    """Token ids that depend on `seed` alone."""
    return torch.randint(0, 50_000, (count,), generator=torch.Generator().manual_seed(seed))


class CacheFactory:
    """What a subclass says, and the folder its tests use."""

    patience: float = 60.0
    """Seconds after which a call that has not returned counts as hung."""

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """Open the cache; `tiers` replaces what `config` says about tiers below DRAM."""
        return CacheEngine(config, spec, tiers=tiers)

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """A folder, in memory where the host has such a thing."""
        base = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="lmcache-cache-", dir=base if base.is_dir() else None))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


class CacheBytesTests(CacheFactory):
    """Bytes, restart, keys, isolation, reset, miss."""

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_layout_reads_what_any_other_wrote_and_no_other_slot_changes(self, dtype: torch.dtype) -> None:
        tokens = tokens_of(3 * CHUNK + 5)
        every = dtype == DTYPES[0]  # which layouts meet has nothing to do with the width of an element
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
                assert target.sequence(dst) == expected, f"{writer} → {reader}: other bits came back"
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
        assert pool.sequence(slots) == expected, "the store went on reading after it had returned"

    @level(Level.BYTES)
    def test_a_slot_of_minus_one_is_neither_read_nor_written(self) -> None:
        """An engine's placeholder block must not be stored, nor loaded into."""
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
            assert same, "other bytes changed than those of the named slots"
            assert any(not torch.equal(a, b) for a, b in zip(before, target.snapshot(), strict=True))

    @level(Level.BYTES)
    def test_a_longer_prompt_hits_its_stored_prefix_and_no_more(self) -> None:
        tokens = tokens_of(6 * CHUNK)
        pool, target = Pool("nhd", 40, seed=1), Pool("nhd", 40, seed=2)
        slots = scattered(6 * CHUNK, pool)
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            cache.store(tokens[: 3 * CHUNK + 2], pool.kv, slots[: 3 * CHUNK + 2])
            with cache.lookup(tokens) as hit:
                assert (hit.tokens, hit.stop) == (3 * CHUNK, "absent")
                assert cache.retrieve(hit, target.kv, slots) == 3 * CHUNK
            held = slots[: 3 * CHUNK]
            assert target.sequence(held) == pool.sequence(held), "the hit is not the beginning of the prompt"
            with cache.lookup(tokens, max_tokens=3 * CHUNK - 1) as hit:
                assert (hit.tokens, hit.stop) == (2 * CHUNK, "max_tokens")
            changed = tokens.clone()
            changed[CHUNK + 1] += 1
            with cache.lookup(changed) as hit:
                assert hit.tokens == CHUNK
            with cache.lookup(tokens[CHUNK : 3 * CHUNK]) as hit:
                assert hit.tokens == 0, "a suffix of what was stored is no hit"

    @level(Level.BYTES)
    def test_layer_by_layer_every_layer_is_complete_when_it_is_announced(self, place: Path) -> None:
        tokens = tokens_of(4 * CHUNK)
        source, target = Pool("packed", 40, seed=1), Pool("packed", 40, seed=2)
        src, dst = scattered(4 * CHUNK, source, seed=3), scattered(4 * CHUNK, target, seed=4)
        expected = source.sequence(src)
        config = tiny_config(disk_path=place)
        with self.open_cache(config, tiny_spec()) as cache:
            cache.store(tokens, source.kv, src)
            cache.flush()
        with self.open_cache(config, tiny_spec()) as cache:
            for tier in ("disk", "dram"):
                for tensor in target.tensors:
                    tensor.view(torch.uint8).fill_(0)
                with cache.lookup(tokens) as hit:
                    load = cache.retrieve_layers(hit, target.kv, dst)
                    for layer in range(LAYERS):
                        assert load.wait(layer), f"layer {layer} never came from {tier}"
                        assert target.sequence(dst)[layer] == expected[layer], f"layer {layer} was announced too early"
                    assert load.finish() == 4 * CHUNK

    @level(Level.BYTES)
    def test_a_hit_restores_the_side_state_of_every_group(self) -> None:
        """A sliding window is part of the hit: without it the engine decodes from garbage."""
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
        holed[: 3 * CHUNK] = -1  # slid out
        with self.open_cache(tiny_config(), spec) as cache:
            cache.store(tokens, source, {0: full, 1: holed})
            with cache.lookup(tokens, max_tokens=4 * CHUNK) as hit:
                assert hit.tokens == 0, "offered, though the window before its end was never stored"
            with cache.lookup(tokens) as hit:
                assert hit.tokens == 6 * CHUNK
                assert cache.retrieve(hit, target, {0: full, 1: window}) == 6 * CHUNK
        for plane in "kv":
            for layer in range(2):
                assert _same(got[0][plane][layer][full], raw[0][plane][layer][full]), (
                    f"full group, {plane}, layer {layer}"
                )
            held = window[4 * CHUNK :]  # the chunks that cover the last CHUNK + 3 tokens
            assert _same(got[1][plane][0][held], raw[1][plane][0][held]), f"the window's {plane} was not restored"

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
                    assert hit.by_tier == {"disk": 4 * CHUNK}, f"{writer} → {reader}: a new cache does not see it"
                    assert cache.retrieve(hit, target.kv, dst) == 4 * CHUNK
                with cache.lookup(tokens) as again:
                    assert again.by_tier == {"dram": 4 * CHUNK}, "what was read is kept in DRAM"
                    assert cache.retrieve(again, target.kv, dst) == 4 * CHUNK
            assert target.sequence(dst) == source.sequence(src), f"{writer} → {reader}, {order}: other bits came back"

    # ---------------------------------------------------------------- keys and isolation

    @level(Level.ISOLATION)
    def test_two_tenants_never_share_a_hit(self, place: Path) -> None:
        tokens = tokens_of(2 * CHUNK)
        pools = {salt: Pool("nhd", 40, seed=seed) for seed, salt in enumerate(["", "a", "b"])}
        slots = scattered(2 * CHUNK, pools["a"])
        config = tiny_config(disk_path=place)
        with self.open_cache(config, tiny_spec()) as cache:
            cache.store(tokens, pools["a"].kv, slots, salt="a")
            for other in ({"salt": "b"}, {}, {"salt": "a", "lora": "x"}, {"salt": "A"}):
                with cache.lookup(tokens, **other) as hit:  # type: ignore[arg-type]
                    assert hit.tokens == 0, f"{other} is offered what belongs to salt 'a'"
                    assert hit.stop == "salt"
            for salt in ("b", ""):
                cache.store(tokens, pools[salt].kv, slots, salt=salt)
            cache.flush()
            self._each_its_own(cache, tokens, pools, slots)
        with self.open_cache(config, tiny_spec()) as cache:
            self._each_its_own(cache, tokens, pools, slots)

    def _each_its_own(
        self, cache: CacheEngine, tokens: torch.Tensor, pools: Mapping[str, Pool], slots: torch.Tensor
    ) -> None:
        for salt, pool in pools.items():
            target = Pool("nhd", 40, seed=50)
            with cache.lookup(tokens, salt=salt) as hit:
                assert cache.retrieve(hit, target.kv, slots) == 2 * CHUNK
            assert target.sequence(slots) == pool.sequence(slots), f"salt {salt!r} got another tenant's KV"

    @level(Level.KEYS)
    def test_new_weights_under_an_old_name_hit_nothing_old(self, place: Path) -> None:
        tokens = tokens_of(2 * CHUNK)
        pool = Pool("nhd", 40)
        slots = scattered(2 * CHUNK, pool)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            cache.store(tokens, pool.kv, slots)
            with cache.lookup(tokens) as hit:
                assert hit.tokens == 2 * CHUNK
            for version in (1, "step-2"):
                cache.set_weights_version(version)
                with cache.lookup(tokens) as hit:
                    assert hit.tokens == 0, f"weights {version!r} are offered what older weights computed"
            cache.set_weights_version("")
            with cache.lookup(tokens) as hit:
                assert hit.tokens == 2 * CHUNK

    @level(Level.KEYS)
    def test_what_decides_the_bits_decides_the_hit(self, place: Path) -> None:
        """Two caches on one folder that differ in one thing share nothing."""
        tokens = tokens_of(2 * CHUNK)
        base = tiny_spec()
        specs = {
            "another dtype": tiny_spec(torch.float16),
            "another model": tiny_spec(model="other"),
            "another engine": KVSpec(base.model, base.groups, base.rects, Numerics(engine="other")),
            "another instruction set": KVSpec(base.model, base.groups, base.rects, Numerics(engine="test", isa="amx")),
            "another backend": KVSpec(
                base.model, base.groups, base.rects, Numerics(engine="test", attention_backend="b")
            ),
            "quantised": KVSpec(base.model, base.groups, base.rects, Numerics(engine="test", quantization="fp8")),
        }
        pool = Pool("nhd", 40)
        config = tiny_config(disk_path=place)
        with self.open_cache(config, base) as cache:
            cache.store(tokens, pool.kv, scattered(2 * CHUNK, pool))
            cache.flush()
        for what, spec in specs.items():
            with self.open_cache(config, spec) as cache, cache.lookup(tokens) as hit:
                assert hit.tokens == 0, f"{what}: offered what {base.numerics} computed"

    @level(Level.KEYS)
    def test_each_rank_reads_its_own_part(self, place: Path) -> None:
        tokens = tokens_of(2 * CHUNK)
        spec = KVSpec.uniform("tp", layers=2, kv_heads=4, head_dim=DIM, dtype="bfloat16", numerics=Numerics(tp=2))
        layout = Layout.parse({"k": "slot head dim", "v": "slot head dim"})
        slots = torch.arange(2 * CHUNK)

        def memory(seed: int) -> dict[str, list[torch.Tensor]]:
            return {
                p: [bits((64, 2, DIM), torch.bfloat16, seed + 10 * i + n) for n in range(2)] for i, p in enumerate("kv")
            }

        held = [memory(100 * rank) for rank in range(2)]
        for rank in range(2):
            with self.open_cache(tiny_config(disk_path=place), spec.shard(tp_rank=rank, tp_size=2)) as cache:
                cache.store(tokens, PagedKV(held[rank], layout), slots)
                cache.flush()
        for rank in range(2):
            got = memory(5000)
            with (
                self.open_cache(tiny_config(disk_path=place), spec.shard(tp_rank=rank, tp_size=2)) as cache,
                cache.lookup(tokens) as hit,
            ):
                assert cache.retrieve(hit, PagedKV(got, layout), slots) == 2 * CHUNK
            for plane in "kv":
                for layer in range(2):
                    same = _same(got[plane][layer][slots], held[rank][plane][layer][slots])
                    assert same, f"rank {rank} read another rank's heads"

    @level(Level.KEYS)
    def test_another_image_behind_the_same_tokens_is_another_prompt(self) -> None:
        tokens = tokens_of(3 * CHUNK)
        pool = Pool("nhd", 40)
        digest = bytes(range(32))
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            cache.store(tokens, pool.kv, scattered(3 * CHUNK, pool), extras=[Extra(CHUNK + 2, 4, digest)])
            for at in range(32):
                other = digest[:at] + bytes([digest[at] ^ 1]) + digest[at + 1 :]
                with cache.lookup(tokens, extras=[Extra(CHUNK + 2, 4, other)]) as hit:
                    assert hit.tokens == CHUNK, (
                        f"an image whose digest differs in byte {at} is offered another image's KV"
                    )
            with cache.lookup(tokens, extras=[Extra(CHUNK + 2, 4, digest)]) as hit:
                assert hit.tokens == 3 * CHUNK

    # ---------------------------------------------------------------- miss

    @level(Level.MISS)
    def test_what_was_never_stored_is_never_a_hit(self, place: Path) -> None:
        pool = Pool("nhd", 40)
        slots = scattered(2 * CHUNK, pool)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            for seed in range(5):
                cache.store(tokens_of(2 * CHUNK, seed), pool.kv, slots)
            for seed in range(100, 200):
                with cache.lookup(tokens_of(4 * CHUNK, seed)) as hit:
                    assert hit.tokens == 0
                    assert cache.retrieve(hit, pool.kv, slots) == 0
            with cache.lookup(tokens_of(CHUNK - 1)) as hit:
                assert hit.tokens == 0, "less than a chunk has no name"

    # ---------------------------------------------------------------- reset

    @level(Level.RESET)
    def test_after_clear_nothing_is_served_from_any_tier_now_or_after_a_restart(self, place: Path) -> None:
        tokens = tokens_of(2 * CHUNK)
        pool = Pool("nhd", 40)
        slots = scattered(2 * CHUNK, pool)
        config = tiny_config(disk_path=place)
        with self.open_cache(config, tiny_spec()) as cache:
            for salt in ("a", "b"):
                cache.store(tokens, pool.kv, slots, salt=salt)
            assert cache.clear(salt="a") > 0
            self._offered(cache, tokens, a=0, b=2 * CHUNK)
        with self.open_cache(config, tiny_spec()) as cache:
            self._offered(cache, tokens, a=0, b=2 * CHUNK)
            cache.clear()
            self._offered(cache, tokens, a=0, b=0)
        assert not list(place.rglob("*.safetensors")), "files are left"
        with self.open_cache(config, tiny_spec()) as cache:
            self._offered(cache, tokens, a=0, b=0)
            assert cache.store(tokens, pool.kv, slots, salt="a") == 2 * CHUNK, "cleared, and no use any more"
            self._offered(cache, tokens, a=2 * CHUNK, b=0)

    def _offered(self, cache: CacheEngine, tokens: torch.Tensor, **wanted: int) -> None:
        for salt, count in wanted.items():
            with cache.lookup(tokens, salt=salt) as hit:
                assert hit.tokens == count, f"salt {salt!r} is offered {hit.tokens} tokens, not {count}"

    # ---------------------------------------------------------------- a host as it is

    @level(Level.FAULTS)
    def test_where_memory_cannot_be_pinned_it_starts_and_works_all_the_same(self) -> None:
        """WSL2, containers with a locked-memory limit: a GPU is there, and pinning fails."""

        def refuse(nbytes: int) -> torch.Tensor:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")

        tokens = tokens_of(CHUNK)
        pool = Pool("nhd", 40)
        slots = scattered(CHUNK, pool)
        with mock.patch("torch.cuda.is_available", return_value=True), mock.patch("lmcache.arena.pinned", refuse):
            try:
                with self.open_cache(tiny_config(), tiny_spec()) as cache:
                    stored = cache.store(tokens, pool.kv, slots)
            except Exception as error:
                raise AssertionError(f"memory can't be pinned, and so it does not start: {error}") from error
        assert stored == CHUNK

    @level(Level.FAULTS)
    def test_it_listens_on_no_network_address(self, place: Path) -> None:
        if not Path("/proc/net/tcp").exists():
            pytest.skip("this host does not tell who listens")
        before = _listening()
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()):
            opened = _listening() - before
        assert not opened, f"it listens on {', '.join(sorted(opened))}: nobody asked for that"

    # ---------------------------------------------------------------- another process

    @level(Level.RESTART)
    def test_another_process_finds_and_reads_what_was_flushed(self, place: Path) -> None:
        stored = self.store_somewhere(str(place))
        found, same = elsewhere(self, "find_there", str(place))
        assert found == stored, f"another process is offered {found} of {stored} tokens"
        assert same, "another process read other bits"

    def store_somewhere(self, place: str) -> int:
        """Store one prompt; tokens stored."""
        pool = Pool("packed", 40, seed=1)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            stored = cache.store(tokens_of(4 * CHUNK), pool.kv, scattered(4 * CHUNK, pool), salt="a", lora="l")
            assert cache.flush()
        return stored

    def find_there(self, place: str) -> tuple[int, bool]:
        """Tokens offered for that prompt, and whether what is loaded is right. Runs in another process."""
        source, target = Pool("packed", 40, seed=1), Pool("nhd", 40, seed=9)
        slots = scattered(4 * CHUNK, source)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            with cache.lookup(tokens_of(4 * CHUNK), salt="a", lora="l") as hit:
                loaded = cache.retrieve(hit, target.kv, slots)
            return hit.tokens, target.sequence(slots[:loaded]) == source.sequence(slots[:loaded])


def _listening() -> set[str]:
    """Addresses on which this host's network namespace listens for TCP, as `address:port`."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        file = Path("/proc/net") / name
        if not file.exists():
            continue
        mine = {link for link in map(_readlink, Path("/proc/self/fd").iterdir()) if link}
        for line in file.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address)[i : i + 4][::-1] for i in range(0, len(address) // 2, 4)]
                found.add(f"{socket.inet_ntop(family, b''.join(words))}:{int(port, 16)}")
    return found


def _readlink(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _hybrid(seed: int) -> tuple[PagedKV, dict[int, dict[str, list[torch.Tensor]]]]:
    """Tensors of two full layers and a sliding one, and their `PagedKV`."""
    layout = Layout.parse({"k": "slot head dim", "v": "slot head dim"})
    tensors = {
        g: {
            p: [bits((200, HEADS, DIM), torch.bfloat16, seed + g * 50 + i * 20 + n) for n in range(2 - g)]
            for i, p in enumerate("kv")
        }
        for g in range(2)
    }
    return PagedKV(tensors, {0: layout, 1: layout}), tensors


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
