"""KV written by one tensor-parallel split and read by another, with semantic sharing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine, KVSpec, Layout, PagedKV
from lmcache_conformance.labs.kv_pool import tiny_config

HEADS, LAYERS, DIM, CHUNK, TOKENS = 4, 3, 8, 16, 64
WHOLE = KVSpec.uniform("m", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype=torch.bfloat16)
SIZE = LAYERS * TOKENS * HEADS * 2 * DIM * 2
VALUES = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KV = VALUES.view(torch.bfloat16).view(LAYERS, TOKENS // CHUNK, CHUNK, HEADS, 2 * DIM)
LAYOUT = Layout.parse("block slot head (kv dim)", block_tokens=CHUNK)
PROMPT = list(range(TOKENS))


def rank_kv(rank: int, size: int) -> list[torch.Tensor]:
    per = HEADS // size
    return [KV[layer][:, :, rank * per : (rank + 1) * per].contiguous() for layer in range(LAYERS)]


def open_cache(folder: Path, rank: int, size: int, share: str) -> CacheEngine:
    config = tiny_config(chunk_tokens=CHUNK, dram_bytes="1MiB", disk_path=folder, share=share)
    return CacheEngine(config, WHOLE.shard(tp_rank=rank, tp_size=size))


def write(folder: Path, size: int, share: str, ranks: range | None = None) -> None:
    for rank in ranks if ranks is not None else range(size):
        with open_cache(folder, rank, size, share) as cache:
            cache.store(PROMPT, PagedKV(rank_kv(rank, size), LAYOUT), torch.arange(TOKENS))
            assert cache.flush()


def read(folder: Path, rank: int, size: int, share: str) -> tuple[int, list[torch.Tensor]]:
    target = [torch.zeros_like(tensor) for tensor in rank_kv(rank, size)]
    with open_cache(folder, rank, size, share) as cache, cache.lookup(PROMPT) as hit:
        return cache.retrieve(hit, PagedKV(target, LAYOUT), torch.arange(TOKENS)), target


@pytest.mark.parametrize(("wrote", "reads"), [(1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2)])
def test_another_split_reads_every_bit(tmp_path: Path, wrote: int, reads: int) -> None:
    write(tmp_path, wrote, "semantic")
    for rank in range(reads):
        loaded, got = read(tmp_path, rank, reads, "semantic")
        assert loaded == TOKENS
        for layer, tensor in enumerate(rank_kv(rank, reads)):
            assert torch.equal(got[layer].view(torch.uint8), tensor.view(torch.uint8))


def test_a_split_of_which_a_rank_is_missing_is_a_miss(tmp_path: Path) -> None:
    write(tmp_path, 2, "semantic", range(1))
    assert read(tmp_path, 0, 1, "semantic")[0] == 0
    assert read(tmp_path, 3, 4, "semantic")[0] == 0
    assert read(tmp_path, 1, 4, "semantic")[0] == TOKENS


def test_without_semantic_sharing_another_split_is_a_miss(tmp_path: Path) -> None:
    write(tmp_path, 2, "exact")
    assert read(tmp_path, 0, 1, "exact")[0] == 0


def test_a_damaged_piece_is_a_miss(tmp_path: Path) -> None:
    write(tmp_path, 2, "semantic")
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        data[5000] ^= 1
        path.write_bytes(data)
    assert read(tmp_path, 0, 1, "semantic")[0] == 0
