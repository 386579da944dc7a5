"""Small specs, paged KV filled with random bits, and raw access that bypasses the code under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lmcache import Config, KVSpec, Layout, PagedKV
from lmcache.spec import Numerics
from lmcache_conformance.contract import PATIENT

CHUNK = 16
HEADS, DIM, LAYERS = 2, 8, 3


def tiny_spec(dtype: torch.dtype = torch.bfloat16, *, model: str = "test", layers: int = LAYERS) -> KVSpec:
    """Returns a spec with two kv heads of dim 8, the shape for which packed and split layouts have equal tensor shapes."""
    return KVSpec.uniform(
        model, layers=layers, kv_heads=HEADS, head_dim=DIM, dtype=dtype, numerics=Numerics(engine="test")
    )


def tiny_config(**changes: object) -> Config:
    """Returns settings with small chunks, DRAM for 64 chunks, no disk, and long timeouts for slow machines."""
    settings: dict[str, object] = {
        "chunk_tokens": CHUNK,
        "dram_bytes": 64 * tiny_spec().object_bytes(0, CHUNK),
        **PATIENT,
        "load_timeout_s": 60.0,
    }
    return Config(**(settings | changes))  # type: ignore[arg-type]


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Returns a tensor of random *bits*, so that NaN payloads, infinities, denormals and −0 occur."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors have the same bytes; NaN payloads and signed zeros count."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Pool:
    """An engine's paged KV with blocks of 4 tokens, in one of several layouts, and a raw reader that uses only torch.

    Args:
        kind: one of `KINDS`.
        blocks: number of blocks.
        dtype: of K and V.
        seed: of the random content.
    """

    BLOCK = 4

    def __init__(self, kind: str, blocks: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> None:
        self.kind = kind
        make, axes, block_tokens = _KINDS[kind]
        self.slots = blocks * self.BLOCK
        self.tensors: Any = make(blocks, self.BLOCK, dtype, seed)
        self.kv = PagedKV(self.tensors, Layout.parse(axes, block_tokens=block_tokens))

    def views(self, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns K and V of one token, each (heads, dim), as views of the raw tensors; the oracle reads and writes these."""
        b, s = divmod(slot, self.BLOCK)
        if self.kind == "packed":
            kv = self.tensors[layer][b, :, s]
            return kv[:, :DIM], kv[:, DIM:]
        if self.kind == "split":
            return self.tensors[layer][0, b, s], self.tensors[layer][1, b, s]
        k, v = (self.tensors[plane][layer] for plane in "kv")
        return (k[slot], v[slot]) if self.kind == "nhd" else (k[b, :, s], v[b, :, s])

    def token(self, layer: int, slot: int) -> tuple[bytes, bytes]:
        """Returns the K and V bytes of one token."""
        k, v = self.views(layer, slot)
        return _raw(k), _raw(v)

    def put(self, slot: int, value: torch.Tensor) -> None:
        """Writes one token; `value` is (layers, 2, heads, dim)."""
        for layer in range(LAYERS):
            for view, new in zip(self.views(layer, slot), value[layer], strict=True):
                view.view(torch.uint8).copy_(new.view(torch.uint8))

    def sequence(self, slots: torch.Tensor, layers: int = LAYERS) -> list[list[tuple[bytes, bytes]]]:
        """Returns the bytes of these slots as [layer][token] → (k, v)."""
        return [[self.token(layer, int(s)) for s in slots] for layer in range(layers)]

    def snapshot(self) -> list[torch.Tensor]:
        """Returns a copy of every byte of the pool."""
        flat = (
            [t for group in self.tensors.values() for t in group] if isinstance(self.tensors, Mapping) else self.tensors
        )
        return [t.detach().clone().view(torch.uint8) for t in flat]


def _raw(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def _packed(blocks: int, block: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """vLLM's layout: all layers in one storage."""
    pool = bits((LAYERS, blocks, HEADS, block, 2 * DIM), dtype, seed)
    return list(pool.unbind(0))


def _nhd(blocks: int, block: int, dtype: torch.dtype, seed: int) -> dict[str, list[torch.Tensor]]:
    return {
        plane: [bits((blocks * block, HEADS, DIM), dtype, seed + 10 * i + layer) for layer in range(LAYERS)]
        for i, plane in enumerate("kv")
    }


def _split(blocks: int, block: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    return [bits((2, blocks, block, HEADS, DIM), dtype, seed + layer) for layer in range(LAYERS)]


def _rows(blocks: int, block: int, dtype: torch.dtype, seed: int) -> dict[str, list[torch.Tensor]]:
    """Hugging Face's layout: one row per sequence, here of four tokens each."""
    return {
        plane: [bits((blocks, HEADS, block, DIM), dtype, seed + 10 * i + layer) for layer in range(LAYERS)]
        for i, plane in enumerate("kv")
    }


_Maker = Callable[[int, int, torch.dtype, int], Any]
_KINDS: dict[str, tuple[_Maker, str | dict[str, str], int | None]] = {
    "packed": (_packed, "block head slot (kv dim)", Pool.BLOCK),
    "nhd": (_nhd, {"k": "slot head dim", "v": "slot head dim"}, None),
    "split": (_split, "kv block slot head dim", Pool.BLOCK),
    "rows": (_rows, {"k": "batch head slot dim", "v": "batch head slot dim"}, None),
}
KINDS = tuple(_KINDS)


def scattered(tokens: int, pool: Pool, *, seed: int = 1) -> torch.Tensor:
    """Returns a slot mapping for `tokens` tokens in randomly chosen whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(pool.slots // Pool.BLOCK, generator=generator)[: -(-tokens // Pool.BLOCK)]
    return (blocks[:, None] * Pool.BLOCK + torch.arange(Pool.BLOCK)).reshape(-1)[:tokens]
