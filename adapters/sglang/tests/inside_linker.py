"""Run by `test_sglang_pools.py` in a separate process: round trips through the tiers with SGLang's real device pools."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import get_parallel

from lmcache.adapter import UnsupportedError
from lmcache_conformance.labs.damage import DAMAGES, object_files
from lmcache_sglang import LMCacheLinker, compat
from lmcache_sglang.compat import Text
from lmcache_sglang.devicepool import DevicePool
from lmcache_sglang.pools import Rank

LAYERS, HEADS, DIM, PAGE, CHUNK, SLOTS = 3, 2, 8, 4, 8, 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = np.array(random.Random(1).choices(range(3, 1000), k=42), dtype=np.uint32)
WHOLE = 40


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank, no hooks: those would outlive the test, and are tested with a real engine."""
    monkeypatch.setattr(compat, "watch_weights", lambda changed: None)
    monkeypatch.setattr(compat, "watch_tokens", lambda: None)
    with get_parallel().override(dcp_enabled=False):
        yield


def device_pool(kind: str, dtype: torch.dtype = torch.bfloat16, start: int = 0, page: int = PAGE) -> Any:
    common: dict[str, Any] = {
        "size": SLOTS,
        "page_size": page,
        "dtype": dtype,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
        "start_layer": start,
        "end_layer": start + LAYERS - 1,
    }
    if kind == "mla":
        return MLATokenToKVPool(kv_lora_rank=16, qk_rope_head_dim=8, **common)
    return MHATokenToKVPool(head_num=HEADS, head_dim=DIM, **common)


def buffers(pool: Any) -> list[torch.Tensor]:
    return [*pool.kv_buffer] if isinstance(pool, MLATokenToKVPool) else [*pool.k_buffer, *pool.v_buffer]


def fill(pool: Any, seed: int) -> None:
    """Fills the pool with random bits, including NaNs and denormals."""
    for number, tensor in enumerate(buffers(pool)):
        raw = tensor.view(torch.uint8)
        generator = torch.Generator().manual_seed(1000 * seed + number)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))


def bits(pool: Any, slots: Any) -> list[torch.Tensor]:
    return [tensor[slots].clone().view(torch.uint8) for tensor in buffers(pool)]


def parameters(pool: Any, page: int = PAGE, **changes: Any) -> Any:
    """The fields of SGLang's `CacheInitParams` that the linker reads."""
    plain: dict[str, Any] = {
        "page_size": page,
        "token_to_kv_pool_allocator": SimpleNamespace(get_kvcache=lambda: pool),
        "tp_cache_group": None,
        "attn_tp_cache_group": None,
        "attn_cp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "is_eagle": False,
        "mtp_draft_device_pools": (),
        "sidecar_draft_device_pools": (),
    }
    return SimpleNamespace(**{**plain, **changes})


class Maker:
    """Opens linkers on one folder and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: list[LMCacheLinker] = []

    def __call__(self, pool: Any, *, components: Any = (ComponentType.FULL,), page: int = PAGE, **extra: Any) -> Any:
        settings = {"disk_path": str(self.folder), "model_identity": "tiny", "chunk_tokens": CHUNK, **extra}
        given = settings.pop("params", {})
        found = LMCacheLinker(None, parameters(pool, page, **given), components=set(components), extra_config=settings)
        self._open.append(found)
        return found

    def close(self) -> None:
        for linker in self._open:
            linker.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path / "disk")
    yield maker
    maker.close()


def offload(linker: Any, text: Text, slots: torch.Tensor) -> bool:
    """Offloads a node as SGLang does; the page hashes are not used."""
    linker.offering(text, slots)
    assert linker.offload([PoolTransfer(name=PoolName.KV, device_indices=slots)])
    until = time.monotonic() + 30
    while not linker.num_completed_offloads():
        assert time.monotonic() < until
        time.sleep(0.001)
    return bool(linker.pop_completed_offload())


def lookup(linker: Any, text: Text, device_tokens: int = 0, rid: str = "r") -> int:
    """Returns the longest prefix found beyond the device's, in pages."""
    linker.asking(text, device_tokens, None)
    found: list[int] = linker.lookup(rid, [])
    assert found == list(range(1, len(found) + 1))
    return len(found)


def load(linker: Any, slots: torch.Tensor, rid: str = "r") -> bool:
    return bool(linker.load(rid, [PoolTransfer(name=PoolName.KV, device_indices=slots)]))


def scattered(count: int, seed: int, page: int = PAGE) -> torch.Tensor:
    """Returns random pages, except the first, which SGLang reserves for padding."""
    pages = random.Random(seed).sample(range(1, SLOTS // page), -(-count // page))
    return torch.cat([torch.arange(p * page, (p + 1) * page) for p in pages])[:count]


TEXT = Text(TOKENS, "", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_pages_come_back_bit_by_bit_and_nothing_else_changes(make: Maker, kind: str, dtype: torch.dtype) -> None:
    source = device_pool(kind, dtype, start=5)
    fill(source, 1)
    before = bits(source, slice(None))
    linker = make(source)
    assert not linker._off
    assert all(map(torch.equal, bits(source, slice(None)), before)), "the proof changed the pool"
    slots = scattered(len(TOKENS), 1)
    assert offload(linker, TEXT, slots)
    assert linker.flush()

    target = device_pool(kind, dtype, start=5)
    fill(target, 2)
    reader = make(target)  # equivalent to a new process
    assert lookup(reader, TEXT) == WHOLE // PAGE
    rest = torch.ones(SLOTS + PAGE, dtype=torch.bool)
    into = scattered(WHOLE, 2)
    rest[into] = False
    others = bits(target, rest)
    assert load(reader, into)
    assert all(map(torch.equal, bits(target, into), bits(source, slots[:WHOLE])))
    assert all(map(torch.equal, bits(target, rest), others)), "other slots were written"


@pytest.mark.parametrize("device_tokens", [4, 8, 20, 36])
def test_only_what_the_device_lacks_is_loaded(make: Maker, device_tokens: int) -> None:
    """Also from the middle of a chunk."""
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    slots = scattered(WHOLE, 1)
    assert offload(linker, TEXT, slots)
    was = bits(pool, slots)
    into = scattered(WHOLE, 3)[device_tokens:]
    fill(pool, 2)
    assert lookup(linker, TEXT, device_tokens) == (WHOLE - device_tokens) // PAGE
    assert load(linker, into)
    assert all(torch.equal(a, b[device_tokens:]) for a, b in zip(bits(pool, into), was, strict=True))
    moved = linker.stats()['lmcache_moved_bytes_total{src="dram",dst="engine"}']
    chunks = WHOLE // CHUNK - device_tokens // CHUNK
    assert moved == chunks * linker._pool.spec.object_bytes(0, CHUNK), "chunks that the device holds were read"


def test_fewer_pages_than_were_found_are_loaded_where_another_rank_has_fewer(make: Maker) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    slots = scattered(WHOLE, 1)
    assert offload(linker, TEXT, slots)
    was = bits(pool, slots)
    fill(pool, 2)
    assert lookup(linker, TEXT) == 10
    into = scattered(12, 3)
    assert load(linker, into)
    assert all(torch.equal(a, b[:12]) for a, b in zip(bits(pool, into), was, strict=True))


@pytest.mark.parametrize("damage", ["bit flipped in the payload", "zeros of the right length"])
def test_damage_is_a_load_refused(make: Maker, damage: str) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    assert offload(linker, TEXT, scattered(WHOLE, 1))
    assert linker.flush()
    reader = make(pool)
    DAMAGES[damage](object_files(make.folder), random.Random(1))
    assert lookup(reader, TEXT) == WHOLE // PAGE, "files are only verified when read"
    assert not load(reader, scattered(WHOLE, 2))
    assert lookup(reader, TEXT) == 0, "a damaged file hits again"


def test_a_request_nobody_asked_about_or_that_waited_too_long_is_computed(make: Maker) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool, lease_s=0.1)
    assert offload(linker, TEXT, scattered(WHOLE, 1))
    assert not load(linker, scattered(WHOLE, 2), rid="unknown")
    assert lookup(linker, TEXT) == 10
    time.sleep(0.2)
    assert not load(linker, scattered(WHOLE, 2))
    for number in range(50):
        assert lookup(linker, TEXT, rid=f"r{number}") == 10
        time.sleep(0.01)
    assert len(linker._waiting) < 20, "requests that were never looked up again are not released"
    linker.reset()
    assert not linker._waiting


def test_what_lies_on_disk_is_fetched_while_a_request_waits(make: Maker) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    assert offload(linker, TEXT, scattered(WHOLE, 1))
    assert linker.flush()
    reader = make(pool)
    for _ in range(2):
        assert lookup(reader, TEXT) == 10
    until = time.monotonic() + 30
    while reader.stats()['lmcache_arena_slots{group="kv",state="ready"}'] < WHOLE // CHUNK:
        assert time.monotonic() < until
    assert load(reader, scattered(WHOLE, 2))


def test_new_weights_find_nothing_of_the_old_not_even_for_who_waits(make: Maker) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    assert offload(linker, TEXT, scattered(WHOLE, 1))
    assert lookup(linker, TEXT) == 10
    linker._weights_changed()
    assert not load(linker, scattered(WHOLE, 2))
    assert lookup(linker, TEXT) == 0


def test_salts_and_extra_keys_set_apart(make: Maker) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    texts = [Text(TOKENS, salt, extra) for salt, extra in (("a", ""), ("", "a"), ("a", "a"), ("b", ""))]
    for number, text in enumerate(texts):
        assert [lookup(linker, t) for t in texts] == [10] * number + [0] * (len(texts) - number)
        assert offload(linker, text, scattered(WHOLE, number))


def test_another_request_of_the_same_name_finds_its_own(make: Maker) -> None:
    pool = device_pool("mha")
    fill(pool, 1)
    linker = make(pool)
    assert offload(linker, TEXT, scattered(WHOLE, 1))
    assert lookup(linker, TEXT, rid="mine") == 10
    assert lookup(linker, Text(TOKENS[::-1].copy(), "", ""), rid="mine") == 0
    assert not load(linker, scattered(WHOLE, 2), rid="mine")


def test_the_text_ends_where_pictures_begin() -> None:
    def text(tokens: list[int], **key: Any) -> Text:
        return compat._text(RadixKey(array("q", tokens), **key))

    assert text([5, 6, 7], extra_key="lora", cache_salt="s")[1:] == ("s", "lora")
    assert text([5, 6, 7])[1:] == ("", "")
    assert text([5, 6, compat.PICTURE + 17, 8]).tokens.tolist() == [5, 6]
    assert text([5, 6, 7], limit=2).tokens.tolist() == [5, 6]


def test_pools_of_another_kind_or_with_other_ways_are_refused() -> None:
    class Unknown(MHATokenToKVPool):
        pass

    class Turned(MHATokenToKVPool):
        def set_kv_buffer(self, layer: Any, loc: Any, cache_k: Any, cache_v: Any, **named: Any) -> None:
            super().set_kv_buffer(layer, loc, cache_k.flip(1), cache_v, **named)

    plain = device_pool("mha")
    numerics, rank = compat.numerics_of(1, 1), Rank()
    for kind, name, reason in ((Unknown, "Unknown", "not supported"), (Turned, "MHATokenToKVPool", "contradict")):
        kind.__name__ = name
        plain.__class__ = kind
        with pytest.raises(UnsupportedError, match=reason):
            DevicePool(plain, PAGE, "tiny", numerics, rank)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": ({"disk_pth": "/x"}, "did you mean 'disk_path'"),
    "nowhere": ({"disk_path": None, "dram_bytes": 0}, "nowhere to keep KV"),
    "sliding windows": ({"components": (ComponentType.FULL, ComponentType.SWA)}, "SWA besides full attention"),
    "context parallelism": ({"params": {"attn_cp_size": 2}}, "context parallelism"),
    "pipelines": ({"params": {"pp_size": 2}}, "pipeline"),
    "drafts": ({"params": {"is_eagle": True}}, "draft"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_cached_is_said_and_everything_is_a_miss(make: Maker, what: str) -> None:
    changes, reason = REFUSED[what]
    pool = device_pool("mha")
    linker = make(pool, **changes)
    assert reason in linker._off
    assert not offload(linker, TEXT, scattered(WHOLE, 1)), "the failure must be reported on every rank"
    assert lookup(linker, TEXT) == 0
    assert not load(linker, scattered(WHOLE, 1))
    linker.reset()


def test_chunks_are_made_of_whole_pages(make: Maker) -> None:
    assert make(device_pool("mha", page=16), page=16, chunk_tokens=24)._config.chunk_tokens == 32
