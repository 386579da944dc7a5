"""SGLang's real host pools without an engine, and each layout's element addresses, written by hand."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

LAYERS, HEADS, DIM, LATENT, PAGE, PAGES = 3, 2, 8, 24, 4, 6
CASES = [("mha", layout) for layout in ("layer_first", "page_first", "page_first_direct", "page_head")]
CASES += [("mla", layout) for layout in ("layer_first", "page_first", "page_first_direct")]
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def host_pool(
    kind: str, layout: str, dtype: torch.dtype = torch.bfloat16, page: int = PAGE, heads: int = HEADS, start: int = 0
) -> Any:
    """A host pool of `PAGES` pages, as HiCache creates it for a device pool of half the size."""
    slots = PAGES * page // 2
    common: dict[str, Any] = {
        "host_to_device_ratio": 2.0 - 1.0 / slots,  # SGLang adds a page
        "host_size": 0,
        "page_size": page,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": slots,
        "start_layer": start,
        "end_layer": start + LAYERS,
    }
    pointers = torch.zeros(LAYERS, dtype=torch.uint64)
    device = torch.device("cpu")
    if kind == "mha":
        rows = [torch.zeros(slots + page, heads, DIM, dtype=dtype) for _ in range(2 * LAYERS)]
        buffers = KVBuffers(
            k=tuple(rows[:LAYERS]),
            v=tuple(rows[LAYERS:]),
            k_data_ptrs=pointers,
            v_data_ptrs=pointers,
            layout=next(iter(KVBufferLayout)),
        )
        info = MHABufferInfo(
            buffers=buffers, page_size=page, head_num=heads, head_dim=DIM, v_head_dim=DIM, dtype=dtype, device=device
        )
        pool = MHATokenToKVPoolHost(info, **common)
    else:
        info = MLABufferInfo(
            buffers=tuple(torch.zeros(slots + page, 1, LATENT, dtype=dtype) for _ in range(LAYERS)),
            data_ptrs=pointers,
            layer_indices=tuple(range(LAYERS)),
            device_layer_num=LAYERS,
            page_size=page,
            kv_lora_rank=LATENT - 8,
            qk_rope_head_dim=8,
            kv_cache_dim=LATENT,
            dtype=dtype,
            device=device,
        )
        pool = MLATokenToKVPoolHost(info, target_layer_num=LAYERS, **common)
    assert pool.page_num == PAGES, pool.page_num
    return pool


def fill(pool: Any, seed: int) -> None:
    """Fills the pool with random bits, including NaNs and denormals."""
    raw = pool.kv_buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def element(pool: Any, kind: str, plane: int, layer: int, slot: int) -> torch.Tensor:
    """Values of one token, `(head, dim)`, with the indexing of SGLang's kernels, by hand for each layout."""
    b, page, offset = pool.kv_buffer, slot // pool.page_size, slot % pool.page_size
    part = b if kind == "mla" else b[plane]
    if pool.layout == "layer_first":
        return part[layer, slot]
    if pool.layout == "page_first":
        return part[slot, layer]
    if pool.layout == "page_first_direct":
        return part[page, layer, offset]
    assert pool.layout == "page_head"
    return part[page, :, offset, layer]


def tokens_of(pool: Any, kind: str, slots: list[int]) -> torch.Tensor:
    """`(plane, layer, slot, head, dim)` as raw bytes."""
    planes = 1 if kind == "mla" else 2
    rows = [
        element(pool, kind, plane, layer, slot).contiguous().view(torch.uint8)
        for plane in range(planes)
        for layer in range(LAYERS)
        for slot in slots
    ]
    return torch.stack(rows)


def storage_config(**changes: Any) -> HiCacheStorageConfig:
    """A config as SGLang creates it for one rank."""
    given: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "tiny",
    }
    return HiCacheStorageConfig(**{**given, **changes})
