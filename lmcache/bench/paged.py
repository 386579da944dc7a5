"""Compares gather and scatter with one memcpy: an engine's paged KV ⇄ objects in an arena, on a CPU.

memcpy, store and retrieve alternate within each repetition and the best time of each counts, since times on a busy machine
are noisy. All memory is touched beforehand, so that no page fault is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lmcache.config import Config
from lmcache.format.codec import checksum
from lmcache.layout import BoundKV, Layout, ObjectLayout, PagedKV, gather, scatter, translate
from lmcache.spec import KVSpec, Numerics
from lmcache.transfer.arena import Arena

LAYOUTS = {
    "packed": "block head slot (kv dim)",
    "nhd": "slot head dim",
    "nhd-kv": "kv block slot head dim",
}
"""Short name → axes: one tensor for all layers (vLLM); separate pools for K and V (SGLang); one tensor per layer."""

PACKINGS: dict[str, str | dict[str, str]] = {
    "packed": LAYOUTS["packed"],
    "vec": {"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"},
    "amx": {"k": "block head (kv slot/16 dim/2 slot%16 dim%2)", "v": "block head (kv dim/16 slot/2 dim%16 slot%2)"},
}
"""Short name → axes of the pages measured against canonical objects: vLLM's on GPUs, and on CPUs."""

PAGES = {"packed": (16, 128), "vec": (16, 128), "amx": (32, 128)}
"""Block sizes in tokens for each of `PACKINGS`; AMX packs 32 tokens at a time."""

PATTERNS = ("permuted", "scattered", "contiguous")
"""Blocks of a sequence: adjacent in random order; random ones of a pool twice as large; adjacent in order."""


@dataclass(frozen=True)
class Shape:
    """A model's KV geometry."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def spec(self) -> KVSpec:
        """The spec of this shape, with bf16 keys and values."""
        return KVSpec.uniform(
            f"bench/{self.name}",
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=torch.bfloat16,
            numerics=Numerics(engine="bench"),
        )


SHAPES = {s.name: s for s in (Shape("smollm2-135m", 30, 3, 64), Shape("8b", 32, 8, 128))}


@dataclass(frozen=True)
class PagedResult:
    """Speed of one case.

    Attributes:
        model: name of the shape.
        block_tokens: tokens per block of the engine.
        layout: see `LAYOUTS`.
        pattern: see `PATTERNS`.
        threads: number of threads that torch and numpy may use.
        memcpy_gbs: GB/s of one copy of the same bytes on as many threads.
        store_gbs, retrieve_gbs: GB/s of gather and scatter.
        checksum_gbs: GB/s of the checksums of `Config.memory_checksums`, on one thread.
        store_ratio, retrieve_ratio, checksum_ratio: relative to memcpy_gbs.
    """

    model: str
    block_tokens: int
    layout: str
    pattern: str
    threads: int
    memcpy_gbs: float
    store_gbs: float
    store_ratio: float
    retrieve_gbs: float
    retrieve_ratio: float
    checksum_gbs: float
    checksum_ratio: float


def measure(
    shape: Shape,
    layout: str,
    *,
    block_tokens: int,
    threads: Sequence[int] = (1,),
    patterns: Sequence[str] = PATTERNS,
    tokens: int = 4096,
    chunk_tokens: int = Config.chunk_tokens,
    repeat: int = 9,
) -> Iterator[PagedResult]:
    """Measures store and retrieve of `tokens` tokens in chunks, one call each, for every pattern and number of threads."""
    pool_tokens = 2 * tokens
    kv = pool(shape, layout, block_tokens, pool_tokens)
    chunks = tokens // chunk_tokens
    native = kv.native(0, chunk_tokens)
    arena = Arena(chunks, native.nbytes, slab_bytes=chunks * (native.nbytes + 4096))
    objects = [arena.view(i) for i in range(chunks)]
    for i, item in enumerate(objects):
        item.fill_(i + 1)
    plain_a = torch.ones(chunks * native.nbytes, dtype=torch.uint8)
    plain_b = torch.ones(chunks * native.nbytes, dtype=torch.uint8)
    for pattern in patterns:
        slots = slots_of(pattern, tokens, pool_tokens, block_tokens)
        scatter(objects, native, kv, 0, slots)
        again = [torch.zeros_like(objects[0])]
        gather(kv, 0, slots[-chunk_tokens:], again, native)
        if not torch.equal(again[0], objects[-1]):
            raise RuntimeError(f"{layout}, {pattern}: what was read is not what was written")
        for count in threads:
            with torch_threads(count):
                copy, store, load, check = _best(
                    repeat,
                    lambda: plain_b.copy_(plain_a),
                    lambda slots=slots: gather(kv, 0, slots, objects, native),  # type: ignore[misc]
                    lambda slots=slots: scatter(objects, native, kv, 0, slots),  # type: ignore[misc]
                    lambda: [checksum(item) for item in objects],
                )
            size = plain_a.nbytes / 1e9
            yield PagedResult(
                model=shape.name,
                block_tokens=block_tokens,
                layout=layout,
                pattern=pattern,
                threads=count,
                memcpy_gbs=size / copy,
                store_gbs=size / store,
                store_ratio=copy / store,
                retrieve_gbs=size / load,
                retrieve_ratio=copy / load,
                checksum_gbs=size / check,
                checksum_ratio=copy / check,
            )


@dataclass(frozen=True)
class CanonicalResult:
    """Speed of one packing with objects in canonical order, the order of files and of exchange between engines.

    Attributes:
        model, block_tokens, threads, memcpy_gbs: as in `PagedResult`.
        packing: see `PACKINGS`.
        store_*, retrieve_*: gather from and scatter to scattered pages, with canonical objects.
        pack_*, unpack_*: `translate` canonical → native objects, and native → canonical.
    """

    model: str
    block_tokens: int
    packing: str
    threads: int
    memcpy_gbs: float
    store_gbs: float
    store_ratio: float
    retrieve_gbs: float
    retrieve_ratio: float
    unpack_gbs: float
    unpack_ratio: float
    pack_gbs: float
    pack_ratio: float


def measure_canonical(
    shape: Shape,
    packing: str,
    *,
    block_tokens: int,
    threads: Sequence[int] = (1,),
    tokens: int = 2048,
    chunk_tokens: int = Config.chunk_tokens,
    repeat: int = 7,
) -> Iterator[CanonicalResult]:
    """Measures store, retrieve and both translations of `tokens` tokens in chunks, for every number of threads."""
    kv = pool(shape, packing, block_tokens, 2 * tokens)
    chunks = tokens // chunk_tokens
    native, canonical = kv.native(0, chunk_tokens), ObjectLayout.canonical(shape.spec, 0, chunk_tokens)
    pages, plain, other = ([*torch.ones(chunks, native.nbytes, dtype=torch.uint8)] for _ in range(3))
    for i, page in enumerate(pages):
        page.copy_(torch.arange(page.numel()) % (251 - i))
    slots = slots_of("scattered", tokens, 2 * tokens, block_tokens)

    def unpack() -> None:
        for page, out in zip(pages, plain, strict=True):
            translate(page, native, out, canonical)

    def pack() -> None:
        for item, out in zip(plain, other, strict=True):
            translate(item, canonical, out, native)

    unpack()
    scatter(plain, canonical, kv, 0, slots)
    gather(kv, 0, slots, other, native)
    if not all(map(torch.equal, pages, other)):
        raise RuntimeError(f"{packing}: what was read is not what was written")
    source, target = torch.ones(2, chunks * native.nbytes, dtype=torch.uint8)
    size = source.nbytes / 1e9
    for count in threads:
        with torch_threads(count):
            copy, *times = _best(
                repeat,
                lambda: target.copy_(source),
                lambda: gather(kv, 0, slots, plain, canonical),
                lambda: scatter(plain, canonical, kv, 0, slots),
                unpack,
                pack,
            )
        figures = [figure for time in times for figure in (size / time, copy / time)]
        yield CanonicalResult(shape.name, block_tokens, packing, count, size / copy, *figures)


def pool(shape: Shape, layout: str, block_tokens: int, tokens: int) -> BoundKV:
    """Returns an engine's KV memory of `tokens` tokens with every page touched."""
    blocks, heads, dim = tokens // block_tokens, shape.kv_heads, shape.head_dim

    def memory(*size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    axes: str | Mapping[str, str] = {**LAYOUTS, **PACKINGS}[layout]
    parsed = Layout.parse(axes, block_tokens=None if layout == "nhd" else block_tokens)
    if layout in ("vec", "amx"):
        inside = 2 * block_tokens * dim
        return PagedKV(list(memory(shape.layers, blocks, heads, inside)), parsed).bind(shape.spec)
    if layout == "packed":
        return PagedKV(list(memory(shape.layers, blocks, heads, block_tokens, 2 * dim)), parsed).bind(shape.spec)
    if layout == "nhd":
        planes = {plane: [memory(tokens, heads, dim) for _ in range(shape.layers)] for plane in ("k", "v")}
        return PagedKV(planes, parsed).bind(shape.spec)
    return PagedKV([memory(2, blocks, block_tokens, heads, dim) for _ in range(shape.layers)], parsed).bind(shape.spec)


def slots_of(pattern: str, tokens: int, pool_tokens: int, block_tokens: int) -> torch.Tensor:
    """Returns the slots of a sequence of `tokens` tokens; see `PATTERNS`."""
    count = tokens // block_tokens
    generator = torch.Generator().manual_seed(0)
    if pattern == "scattered":
        blocks = torch.randperm(pool_tokens // block_tokens, generator=generator)[:count]
    else:
        blocks = torch.randperm(count, generator=generator) if pattern == "permuted" else torch.arange(count)
        blocks += 1
    return (blocks[:, None] * block_tokens + torch.arange(block_tokens)).reshape(-1)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of torch threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(repeat: int, *calls: Callable[[], object]) -> list[float]:
    """Returns the best time of each call in seconds. Each call runs twice in a row, so that its own data is in the caches."""
    best = [float("inf")] * len(calls)
    for _ in range(repeat):
        for i, call in enumerate(calls):
            call()
            began = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - began)
    return best
