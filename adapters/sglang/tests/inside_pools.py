"""Run by `test_sglang_pools.py` in a separate process: round trips of pages, compared with naive reads of SGLang's pools."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from poollab import CASES, DTYPES, LAYERS, PAGE, PAGES, fill, host_pool, storage_config, tokens_of
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from lmcache.adapter import UnsupportedError
from lmcache_conformance.labs.damage import object_files, poison
from lmcache_sglang import LMCacheStorage, compat, launch, pools

KEYS = [f"{n:064x}" for n in range(PAGES)]


@pytest.fixture(autouse=True)
def _no_weight_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks would outlive the test; they are tested with a real engine."""
    monkeypatch.setattr(compat, "watch_weights", lambda changed: None)


class Maker:
    """Opens storages on one folder and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: list[LMCacheStorage] = []

    def __call__(self, pool: Any, *, kind: type[LMCacheStorage] = LMCacheStorage, **changes: Any) -> LMCacheStorage:
        extra = {**launch.BACKEND, "disk_path": str(self.folder), "model_identity": "tiny", **changes.pop("extra", {})}
        storage = kind(storage_config(extra_config=extra, **changes), {})
        storage.register_mem_pool_host(pool)
        self._open.append(storage)
        return storage

    def close(self) -> None:
        for storage in self._open:
            storage.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path / "disk")
    yield maker
    maker.close()


def slots_of(pages: list[int], page: int = PAGE) -> torch.Tensor:
    return torch.cat([torch.arange(p * page, (p + 1) * page) for p in pages])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_pages_come_back_bit_by_bit_and_nothing_else_changes(
    make: Maker, kind: str, layout: str, dtype: torch.dtype
) -> None:
    source = host_pool(kind, layout, dtype)
    fill(source, 1)
    before = source.kv_buffer.clone()
    writer = make(source)
    assert torch.equal(source.kv_buffer.view(torch.uint8), before.view(torch.uint8)), "the proof changed the pool"
    pages, target_pages = [4, 1, 5], [0, 3, 2]
    assert writer.batch_set_v1(KEYS[:3], slots_of(pages)) == [True] * 3
    assert writer.flush()
    assert writer.batch_exists([*KEYS[:3], "ff"]) == 3
    target = host_pool(kind, layout, dtype)
    fill(target, 2)
    untouched = tokens_of(target, kind, slots_of([1, 4, 5]).tolist())
    reader = make(target)  # another engine on the same folder reads from disk
    assert reader.batch_get_v1(KEYS[:3], slots_of(target_pages)) == [True] * 3
    wanted = tokens_of(source, kind, slots_of(pages).tolist())
    assert torch.equal(tokens_of(target, kind, slots_of(target_pages).tolist()), wanted)
    assert torch.equal(tokens_of(target, kind, slots_of([1, 4, 5]).tolist()), untouched)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_every_layout_reads_what_every_other_has_written(make: Maker, kind: str) -> None:
    layouts = [layout for found, layout in CASES if found == kind]
    for number, layout in enumerate(layouts):
        source = host_pool(kind, layout)
        fill(source, number)
        keys = [f"{number:02x}{key}" for key in KEYS]
        writer = make(source)
        assert all(writer.batch_set_v1(keys, slots_of(list(range(PAGES)))))
        writer.flush()
        for other in layouts:
            target = host_pool(kind, other)
            assert all(make(target).batch_get_v1(keys, slots_of(list(range(PAGES)))))
            every = list(range(PAGES * PAGE))
            assert torch.equal(tokens_of(target, kind, every), tokens_of(source, kind, every)), (layout, other)


def test_a_key_names_its_page_wherever_a_call_begins(make: Maker) -> None:
    """SGLang only loads the part of a prefix that it does not hold itself."""
    pool = host_pool("mha", "page_first")
    fill(pool, 3)
    storage = make(pool)
    storage.batch_set_v1(KEYS, slots_of(list(range(PAGES))))
    wanted = tokens_of(pool, "mha", slots_of([4]).tolist())
    fill(pool, 4)
    assert storage.batch_exists(KEYS[3:]) == PAGES - 3
    assert storage.batch_get_v1(KEYS[4:5], slots_of([0])) == [True]
    assert torch.equal(tokens_of(pool, "mha", slots_of([0]).tolist()), wanted)


def test_what_lies_behind_a_gap_is_not_counted(make: Maker) -> None:
    pool = host_pool("mha", "layer_first")
    storage = make(pool)
    storage.batch_set_v1([KEYS[0], KEYS[2]], slots_of([0, 2]))
    assert storage.batch_exists(KEYS[:3]) == 1
    assert storage.batch_get_v1(KEYS[:3], slots_of([3, 4, 5])) == [True, False, False]
    assert storage.batch_get_v1([], torch.empty(0, dtype=torch.int64)) == []
    assert storage.batch_exists([]) == 0


def test_more_pages_than_one_batch(make: Maker) -> None:
    pool = host_pool("mha", "page_first_direct")
    fill(pool, 5)
    storage = make(pool)
    keys = [f"{n:04x}" for n in range(300)]
    assert all(storage.batch_set_v1(keys, slots_of([n % PAGES for n in range(300)])))
    storage.flush()
    assert storage.batch_exists(keys) == 300
    target = host_pool("mha", "page_first_direct")
    for n in range(0, 300, PAGES):
        assert all(make_once(make, target).batch_get_v1(keys[n : n + PAGES], slots_of(list(range(PAGES)))))
        assert torch.equal(target.kv_buffer.view(torch.uint8), pool.kv_buffer.view(torch.uint8))
        target.kv_buffer.zero_()


_made: dict[int, LMCacheStorage] = {}


def make_once(make: Maker, pool: Any) -> LMCacheStorage:
    if id(pool) not in _made:
        _made[id(pool)] = make(pool)
    return _made[id(pool)]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_flat_pages_and_zero_copy_are_the_same_objects(make: Maker, kind: str, layout: str) -> None:
    pool = host_pool(kind, layout)
    fill(pool, 6)
    storage = make(pool)
    assert storage.batch_set(KEYS[:2], [pool.get_data_page(PAGE * n, flat=True) for n in (2, 5)])
    assert storage.exists(KEYS[1])
    assert not storage.exists(KEYS[2])
    wanted = tokens_of(pool, kind, slots_of([2, 5]).tolist())
    assert storage.batch_get_v1(KEYS[:2], slots_of([0, 1])) == [True, True]
    assert torch.equal(tokens_of(pool, kind, slots_of([0, 1]).tolist()), wanted)
    found = storage.batch_get(KEYS[:3], [pool.get_dummy_flat_data_page() for _ in range(3)])
    assert found[2] is None
    for page, number in zip(found, (2, 5), strict=False):
        raw = pool.get_data_page(PAGE * number, flat=True).view(torch.uint8)
        assert page is not None
        assert torch.equal(page.view(torch.uint8), raw)


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"extra": {"model_identity": "other"}},
    "dtype": {"pool": {"dtype": torch.float16}},
    "page": {"pool": {"page": 2 * PAGE}},
    "heads": {"pool": {"heads": 1}},
    "layers": {"pool": {"start": LAYERS}},
    "rank": {"tp_size": 2, "tp_rank": 1},
    "ranks": {"tp_size": 2},
    "stage": {"pp_size": 2},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_values_changes_names(make: Maker, what: str) -> None:
    pool = host_pool("mha", "page_first")
    make(pool).batch_set_v1(KEYS[:1], slots_of([0]))
    make.close()
    changes = dict(CHANGES[what])
    other = host_pool("mha", "page_first", **changes.pop("pool", {}))
    reader = make(other, **changes)
    assert reader.batch_exists(KEYS[:1]) == 0
    assert reader.batch_get_v1(KEYS[:1], slots_of([0], other.page_size)) == [False]
    assert make(host_pool("mha", "layer_first")).batch_exists(KEYS[:1]) == 1


def test_ranks_of_an_mla_model_share_what_one_of_them_writes(make: Maker) -> None:
    pool = host_pool("mla", "page_first")
    fill(pool, 7)
    ranks = {"is_mla_model": True, "tp_size": 2}
    second = make(host_pool("mla", "page_first"), tp_rank=1, **ranks)
    assert second.batch_set_v1(KEYS[:1], slots_of([0])) == [True]
    assert second.flush()
    assert not object_files(make.folder)
    first = make(pool, tp_rank=0, **ranks)
    first.batch_set_v1(KEYS[:1], slots_of([0]))
    first.flush()
    assert second.batch_get_v1(KEYS[:1], slots_of([3])) == [True]


def test_sidecars_of_an_mla_model_are_shared_but_for_states(make: Maker) -> None:
    ranks = {"is_mla_model": True, "tp_size": 2}
    first, second = (make(host_pool("mla", "page_first"), tp_rank=n, **ranks) for n in (0, 1))
    indexer, state = host_pool("mla", "page_first"), StatePool()
    for storage in (first, second):
        storage.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
        storage.register_mem_host_pool_v2(state, PoolName.MAMBA)
    transfers = [
        PoolTransfer(PoolName.INDEXER, slots_of([0]), keys=KEYS[:1]),
        PoolTransfer(PoolName.MAMBA, torch.tensor([0]), keys=KEYS[:1]),
    ]
    first.batch_set_v2(transfers)
    first.flush()
    assert second.batch_get_v2(transfers) == {PoolName.INDEXER: [True], PoolName.MAMBA: [False]}


def test_damaged_pages_are_misses(make: Maker) -> None:
    pool = host_pool("mha", "page_first")
    fill(pool, 8)
    writer = make(pool)
    writer.batch_set_v1(KEYS[:3], slots_of([0, 1, 2]))
    writer.flush()
    victim = sorted(object_files(make.folder))[1]
    raw = bytearray(victim.read_bytes())
    raw[-5000 % len(raw)] ^= 1
    victim.write_bytes(raw)
    target = host_pool("mha", "page_first")
    reader = make(target)
    got = [reader.batch_get_v1([key], slots_of([n]))[0] for n, key in enumerate(KEYS[:3])]
    assert got.count(False) == 1, got
    for n in (n for n, fine in enumerate(got) if fine):
        part = slots_of([n]).tolist()
        assert torch.equal(tokens_of(target, "mha", part), tokens_of(pool, "mha", part))


def test_new_weights_under_the_old_name_find_nothing(make: Maker) -> None:
    storage = make(host_pool("mha", "page_first"))
    storage.batch_set_v1(KEYS[:1], slots_of([0]))
    storage._weights_changed()
    assert storage.batch_exists(KEYS[:1]) == 0
    storage.batch_set_v1(KEYS[:1], slots_of([0]))
    assert storage.batch_exists(KEYS[:1]) == 1
    storage.flush()
    assert make(host_pool("mha", "page_first")).batch_exists(KEYS[:1]) == 1, (
        "KV stored before is still valid for others"
    )


def test_clear_empties_the_folder(make: Maker) -> None:
    storage = make(host_pool("mha", "page_first"))
    storage.batch_set_v1(KEYS, slots_of(list(range(PAGES))))
    storage.flush()
    assert object_files(make.folder)
    assert storage.clear()
    assert not object_files(make.folder)
    assert storage.batch_exists(KEYS) == 0


# ---------------------------------------------------------------- wrong layouts


def test_a_layout_that_is_not_true_is_found_out(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """Two heads, two planes, four slots: the shape fits several layouts."""
    pool = host_pool("mha", "page_first_direct", page=LAYERS)
    pool.layout = "page_first_direct"
    views = pool.k_data_refs
    pool.k_data_refs, pool.v_data_refs = pool.v_data_refs, views  # swapped K and V
    with caplog.at_level(logging.WARNING, "lmcache"):
        storage = make(pool)
    assert "contradict" in storage._off or storage._stores["kv"].pages.label.startswith("opaque")


def test_transposed_accessors_are_found_out() -> None:
    pool = host_pool("mha", "page_head", heads=PAGE)  # heads and slots of a page: the same number
    plain = pool.get_data_page
    pool.get_data_page = lambda index, flat=True: (
        plain(index, False).transpose(2, 3).flatten() if flat else plain(index, False).transpose(2, 3)
    )
    spec_pages = pools.DirectPages
    with pytest.raises(UnsupportedError, match="contradict"):
        spec_pages(pool, "m", compat.numerics_of(1, 1), pools.Rank())


def test_an_unknown_layout_goes_as_opaque_pages(make: Maker) -> None:
    pool = host_pool("mha", "page_first")
    pool.layout = "something_new"
    plain = host_pool("mha", "page_first")
    pool.get_data_page = lambda index, flat=True: plain.get_data_page(index, flat)
    pool.set_from_flat_data_page = plain.set_from_flat_data_page
    storage = make(pool)
    fill(plain, 9)
    wanted = tokens_of(plain, "mha", slots_of([1]).tolist())
    assert storage.batch_set_v1(KEYS[:1], slots_of([1])) == [True]
    assert storage.batch_get_v1(KEYS[:1], slots_of([4])) == [True]
    assert torch.equal(tokens_of(plain, "mha", slots_of([4]).tolist()), wanted)
    assert make(host_pool("mha", "page_first")).batch_exists(KEYS[:1]) == 0


# ---------------------------------------------------------------- sidecar pools


class StatePool:
    """Simulates Mamba's state pool: one slot per page, with the concatenated bytes of several tensors."""

    page_size = 1
    layout = "page_first"
    dtype = torch.float32

    def __init__(self, slots: int = 8) -> None:
        self.conv = torch.zeros(slots, 5, dtype=torch.bfloat16)
        self.state = torch.zeros(slots, 3, 4)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        parts = [tensor[int(index)].contiguous().view(-1).view(torch.uint8) for tensor in (self.conv, self.state)]
        return torch.cat(parts)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(5 * 2 + 12 * 4, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        self.conv[int(index)] = page[:10].clone().view(torch.bfloat16)
        self.state[int(index)] = page[10:].clone().view(torch.float32).view(3, 4)


def test_a_state_pool_restores_prefixes_that_end_where_it_has_a_state(make: Maker) -> None:
    storage, state = make(host_pool("mha", "page_first")), StatePool()
    storage.register_mem_host_pool_v2(state, PoolName.MAMBA)
    storage.batch_set_v1(KEYS[:5], slots_of([0, 1, 2, 3, 4]))
    state.state[6], state.conv[6] = torch.randn(3, 4), 2.0
    wanted = state.state[6].clone()
    at = [PoolTransfer(PoolName.MAMBA, torch.tensor([6]), keys=[KEYS[2]], hit_policy=PoolHitPolicy.TRAILING_PAGES)]
    assert storage.batch_set_v2(at) == {PoolName.MAMBA: [True]}
    ask = [PoolTransfer(PoolName.MAMBA, keys=[KEYS[4]], hit_policy=PoolHitPolicy.TRAILING_PAGES)]
    found = storage.batch_exists_v2(KEYS[:5], ask)
    assert found.kv_hit_pages == 3
    assert found.restorable_prefix_pages == [3]
    assert found.extra_pool_hit_pages == {"kv": 5, PoolName.MAMBA: 3}
    get = [PoolTransfer(PoolName.MAMBA, torch.tensor([1]), keys=[KEYS[2]])]
    assert storage.batch_get_v2(get) == {PoolName.MAMBA: [True]}
    assert torch.equal(state.state[1], wanted)
    assert state.conv[1].eq(2.0).all()


def test_a_window_pool_and_an_indexer(make: Maker) -> None:
    """A sliding window needs the last pages of a prefix, an indexer all of them."""
    storage = make(host_pool("mha", "page_first"))
    swa, indexer = host_pool("mha", "page_first_direct", heads=1), host_pool("mla", "page_first")
    fill(swa, 1), fill(indexer, 2)
    storage.register_mem_host_pool_v2(swa, PoolName.SWA)
    storage.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
    storage.batch_set_v1(KEYS, slots_of(list(range(PAGES))))
    storage.batch_set_v2([PoolTransfer(PoolName.SWA, slots_of([0, 1, 2]), keys=KEYS[2:5])])
    storage.batch_set_v2([PoolTransfer(PoolName.INDEXER, slots_of([0, 1, 2, 3]), keys=KEYS[:4])])
    window = PoolTransfer(PoolName.SWA, keys=KEYS[4:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    every = PoolTransfer(PoolName.INDEXER, keys=KEYS)
    assert storage.batch_exists_v2(KEYS, [window]).restorable_prefix_pages == [4, 5]
    assert storage.batch_exists_v2(KEYS, [window, every]).kv_hit_pages == 4
    raw = swa.get_data_page(PAGE, flat=True).clone()
    assert storage.batch_get_v2([PoolTransfer(PoolName.SWA, slots_of([5]), keys=KEYS[3:4])]) == {"swa": [True]}
    assert torch.equal(swa.get_data_page(5 * PAGE, flat=True).view(torch.uint8), raw.view(torch.uint8))


def test_a_pool_that_cannot_be_read_makes_hits_that_need_it_misses(
    make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make(host_pool("mha", "page_first"))
    with caplog.at_level(logging.WARNING, "lmcache"):
        storage.register_mem_host_pool_v2(object(), PoolName.DRAFT)
    assert "pool-refused pool=draft" in caplog.text
    storage.batch_set_v1(KEYS[:2], slots_of([0, 1]))
    transfer = PoolTransfer(PoolName.DRAFT, slots_of([0, 1]), keys=KEYS[:2])
    assert storage.batch_exists_v2(KEYS[:2], [transfer]).kv_hit_pages == 0
    assert storage.batch_get_v2([transfer]) == {PoolName.DRAFT: [False, False]}
    assert storage.batch_exists(KEYS[:2]) == 2


# ---------------------------------------------------------------- bad input: one message, and misses


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"extra": {"disk_pth": "/tmp/x"}}, "did you mean 'disk_path'"),
    "bad value": ({"extra": {"disk_bytes": "many"}}, "disk_bytes"),
    "nowhere": ({"extra": {"disk_path": None}}, "set disk_path"),
    "page": ({"extra": {"chunk_tokens": PAGE + 1}}, "no multiple of SGLang's page of 4"),
    "no model": ({"extra": {"model_identity": None}}, "set model_identity"),
    "context parallel": ({"attn_cp_size": 2}, "attn_cp_size"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_said_once_and_sglang_goes_on(make: Maker, what: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, message = BAD[what]
    pool = host_pool("mha", "page_first")
    with caplog.at_level(logging.WARNING, "lmcache"):
        storage = make(pool, **json.loads(json.dumps(changes)))
        storage.register_mem_host_pool_v2(StatePool(), PoolName.MAMBA)
        storage.on_host_pools_registered()
        assert storage.batch_set_v1(KEYS[:2], slots_of([0, 1])) == [True, True]
        assert storage.batch_exists(KEYS[:2]) == 0
        assert storage.batch_get_v1(KEYS[:2], slots_of([0, 1])) == [False, False]
        assert storage.batch_exists_v2(KEYS[:2], [PoolTransfer(PoolName.MAMBA)]).kv_hit_pages == 0
        assert storage.get(KEYS[0], pool.get_dummy_flat_data_page()) is None
        assert storage.set(KEYS[0], pool.get_dummy_flat_data_page())
        assert storage.clear() is True
        storage.close()
    said = [record.getMessage() for record in caplog.records if record.name == "lmcache"]
    assert len(said) == 1, said
    assert "cache-disabled" in said[0]
    assert message in said[0]


@pytest.mark.parametrize(("version", "message"), [("0.4.9", "too old"), ("0.6.0", "never tested")])
def test_other_versions(make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: Any, version: str, message: str) -> None:
    monkeypatch.setattr(compat, "_version", lambda: version)
    with caplog.at_level(logging.WARNING, "lmcache"):
        storage = make(host_pool("mha", "page_first"))
    assert message in caplog.text
    assert bool(storage._off) == (version == "0.4.9")


def test_wrong_calls_are_misses(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    storage = make(host_pool("mha", "page_first"))
    with caplog.at_level(logging.WARNING, "lmcache"):
        assert storage.batch_set_v1(KEYS[:2], slots_of([0])) == [False, False]
        assert storage.batch_get_v1(KEYS[:2], torch.tensor([10**6] * 8)) == [False, False]
        assert storage.batch_exists(["", "x"]) == 0
    assert "storage-failed" in caplog.text


# ---------------------------------------------------------------- broken backends are detected


class NoModel(LMCacheStorage):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._model = "always the same"


def test_a_backend_that_forgets_the_model_would_be_found_out(make: Maker) -> None:
    make(host_pool("mha", "page_first"), kind=NoModel).batch_set_v1(KEYS[:1], slots_of([0]))
    other = make(host_pool("mha", "page_first"), kind=NoModel, extra={"model_identity": "other"})
    assert other.batch_exists(KEYS[:1]) == 1


def test_poison_with_true_checksums_does_reach_the_pool(make: Maker) -> None:
    """Shows that tests with poisoned files detect whether the bytes are used."""
    pool = host_pool("mha", "page_first")
    fill(pool, 1)
    writer = make(pool)
    writer.batch_set_v1(KEYS[:1], slots_of([0]))
    writer.flush()
    for path in object_files(make.folder):
        poison(path)
    target = host_pool("mha", "page_first")
    assert make(target).batch_get_v1(KEYS[:1], slots_of([0])) == [True]
    part = slots_of([0]).tolist()
    assert not torch.equal(tokens_of(target, "mha", part), tokens_of(pool, "mha", part))
