"""A cache serves only what belongs to the request (keys, isolation, miss, reset) and works within its host's limits."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lmcache import CacheEngine, Layout, PagedKV
from lmcache.keys import Extra
from lmcache.spec import KVSpec, Numerics
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.alike import ALIKE, shown
from lmcache_conformance.labs.kv_pool import CHUNK, DIM, Pool, bits, equal_bits, scattered, tiny_config, tiny_spec
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.cache_factory import CacheFactory, tokens_of


class CacheNameTests(CacheFactory):
    """Keys, isolation, miss, reset."""

    # ---------------------------------------------------------------- keys and isolation

    @level(Level.ISOLATION)
    def test_two_tenants_never_share_a_hit(self, place: Path) -> None:
        tokens = tokens_of(2 * CHUNK)
        pools = {salt: Pool("nhd", 40, seed=seed) for seed, salt in enumerate(["", "a", "b"])}
        slots = scattered(2 * CHUNK, pools["a"])
        config = tiny_config(disk_path=place)
        with self.open_cache(config, tiny_spec()) as cache:
            cache.store(tokens, pools["a"].kv, slots, salt="a")
            with cache.lookup(tokens_of(2 * CHUNK, seed=9)) as hit:
                unknown = hit.stop
            for other in ({"salt": "b"}, {}, {"salt": "a", "lora": "x"}, {"salt": "A"}):
                with cache.lookup(tokens, **other) as hit:  # type: ignore[arg-type]
                    assert hit.tokens == 0, f"{other} hits KV that belongs to salt 'a'"
                    assert hit.stop == unknown, "the reason of a miss reveals to one tenant what another has stored"
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
            assert target.sequence(slots) == pool.sequence(slots), f"salt {salt!r} loaded another tenant's KV"

    @level(Level.ISOLATION)
    @pytest.mark.parametrize("what", ["salt", "lora"])
    def test_names_that_differ_late_or_little_share_nothing(self, what: str) -> None:
        def named(name: str) -> Any:
            return {what: name}

        tokens = tokens_of(CHUNK)
        pools = {name: Pool("nhd", 4, seed=seed) for seed, name in enumerate(ALIKE)}
        slots = torch.arange(CHUNK)
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            for name, pool in pools.items():
                with cache.lookup(tokens, **named(name)) as hit:
                    assert hit.tokens == 0, f"{what} {shown(name)} hits KV of a name like it"
                cache.store(tokens, pool.kv, slots, **named(name))
            for name, pool in pools.items():
                target = Pool("nhd", 4, seed=99)
                with cache.lookup(tokens, **named(name)) as hit:
                    assert cache.retrieve(hit, target.kv, slots) == CHUNK, f"{what} {shown(name)} misses its own KV"
                assert target.sequence(slots) == pool.sequence(slots), f"{what} {shown(name)} loaded KV of another"

    @level(Level.KEYS)
    def test_every_salt_lora_and_scope_has_a_namespace_of_its_own(self) -> None:
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            names = [(what, name) for what in ("salt", "lora", "scope") for name in ALIKE]
            owners: dict[bytes, tuple[str, str]] = {cache.namespace(): ("", "")}
            for what, name in names:
                other = owners.setdefault(cache.namespace(**{what: name}), (what, name))
                assert other == (what, name), f"{what} {shown(name)} has the namespace of {other[0]} {shown(other[1])}"

    @level(Level.KEYS)
    def test_new_weights_do_not_hit_kv_of_old_weights(self, place: Path) -> None:
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
                    assert hit.tokens == 0, f"weights {version!r} hit KV computed with older weights"
            cache.set_weights_version("")
            with cache.lookup(tokens) as hit:
                assert hit.tokens == 2 * CHUNK

    @level(Level.KEYS)
    def test_whatever_changes_the_bits_prevents_a_hit(self, place: Path) -> None:
        """Two caches on one folder whose specs differ in one field share nothing."""
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
                assert hit.tokens == 0, f"{what}: a hit on KV computed with {base.numerics}"

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
                    same = equal_bits(got[plane][layer][slots], held[rank][plane][layer][slots])
                    assert same, f"rank {rank} read another rank's heads"

    @level(Level.KEYS)
    def test_the_same_tokens_with_another_image_do_not_hit(self) -> None:
        tokens = tokens_of(3 * CHUNK)
        pool = Pool("nhd", 40)
        digest = bytes(range(32))
        with self.open_cache(tiny_config(), tiny_spec()) as cache:
            cache.store(tokens, pool.kv, scattered(3 * CHUNK, pool), extras=[Extra(CHUNK + 2, 4, digest)])
            for at in range(32):
                other = digest[:at] + bytes([digest[at] ^ 1]) + digest[at + 1 :]
                with cache.lookup(tokens, extras=[Extra(CHUNK + 2, 4, other)]) as hit:
                    assert hit.tokens == CHUNK, f"an image whose digest differs in byte {at} hits another image's KV"
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
                assert hit.tokens == 0, "less than a chunk has no key and must miss"

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
        assert not list(place.rglob("*.safetensors")), "files are left after clear()"
        with self.open_cache(config, tiny_spec()) as cache:
            self._offered(cache, tokens, a=0, b=0)
            assert cache.store(tokens, pool.kv, slots, salt="a") == 2 * CHUNK, "nothing can be stored after clear()"
            self._offered(cache, tokens, a=2 * CHUNK, b=0)

    def _offered(self, cache: CacheEngine, tokens: torch.Tensor, **wanted: int) -> None:
        for salt, count in wanted.items():
            with cache.lookup(tokens, salt=salt) as hit:
                assert hit.tokens == count, f"salt {salt!r} hits {hit.tokens} tokens, not {count}"

    # ---------------------------------------------------------------- limits of the host

    @level(Level.FAULTS)
    def test_without_pinned_memory_the_cache_still_works(self) -> None:
        """On WSL2, and in containers with a locked-memory limit, there is a GPU but pinning fails."""

        def refuse(nbytes: int) -> torch.Tensor:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")

        tokens = tokens_of(CHUNK)
        pool = Pool("nhd", 40)
        slots = scattered(CHUNK, pool)
        with (
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("lmcache.memory.pinned", refuse),
        ):
            try:
                with self.open_cache(tiny_config(), tiny_spec()) as cache:
                    stored = cache.store(tokens, pool.kv, slots)
            except Exception as error:
                raise AssertionError(f"memory cannot be pinned, and the cache does not start: {error}") from error
        assert stored == CHUNK

    @level(Level.FAULTS)
    def test_it_listens_on_no_network_address(self, place: Path) -> None:
        if not Path("/proc/net/tcp").exists():
            pytest.skip("this host does not list listening sockets (no /proc/net/tcp)")
        before = _listening()
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()):
            opened = _listening() - before
        assert not opened, f"the cache listens on {', '.join(sorted(opened))}, which was not requested"


def _listening() -> set[str]:
    """Returns the addresses on which this process listens for TCP, as `address:port`."""
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
