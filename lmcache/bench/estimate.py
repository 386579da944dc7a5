"""Estimates the cost of moving KV on a GPU by arithmetic: a prediction to compare measurements with.

Three numbers per 1,000 tokens: the time the link is busy, the number of copy-engine descriptors, and the GPU compute taken
from the forward pass (SM-milliseconds; a GPU with 132 SMs has 132 of them per millisecond).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from lmcache.config import Config
from lmcache.config.settings import parse_size


@dataclass(frozen=True)
class Model:
    """KV geometry of one rank.

    Attributes:
        name: model and parallelism.
        layers: number of layers on this rank.
        page_bytes: contiguous bytes of one block of one layer.
        block_tokens: tokens per block.
    """

    name: str
    layers: int
    page_bytes: int
    block_tokens: int

    @property
    def token_bytes(self) -> float:
        """Bytes of KV per token on this rank."""
        return self.layers * self.page_bytes / self.block_tokens


def attention(
    name: str, layers: int, kv_heads: int, head_dim: int, *, block_tokens: int = 16, itemsize: int = 2
) -> Model:
    """Returns a model whose pages hold K‖V of all its heads, as vLLM's do."""
    return Model(name, layers, block_tokens * kv_heads * 2 * head_dim * itemsize, block_tokens)


MODELS = (
    attention("Llama-3-8B", 32, 8, 128),
    attention("Llama-3-70B, TP 8", 80, 1, 128),
    attention("Llama-3-70B, TP 1", 80, 8, 128),
    Model("DeepSeek-V3 (MLA)", 61, 64 * 576 * 2, 64),
)
"""bf16; blocks of 16 tokens, and of 64 for MLA."""


@dataclass(frozen=True)
class Link:
    """A link between host and GPU memory.

    Attributes:
        name: label of the link.
        gbs: GB/s in one direction, as reached by large copies.
        latency_us: latency of a load from host memory by a kernel.
    """

    name: str
    gbs: float
    latency_us: float


LINKS = (Link("PCIe 4 ×16", 25.0, 1.5), Link("PCIe 5 ×16", 52.0, 1.5), Link("NVLink-C2C", 380.0, 1.0))

SMS = 132
HBM_GBS = 3350.0
"""An H100 SXM."""

SM_BYTES_IN_FLIGHT = 64 << 10
"""Bytes in flight per SM in the run kernels: 16 bytes × 4 per thread, 128 threads, 8 programs (see `--aot`)."""


@dataclass(frozen=True)
class Estimate:
    """Cost of 1,000 tokens of one model over one link.

    Attributes:
        model, link: names.
        megabytes: bytes moved.
        descriptors: pieces that are contiguous on both sides, if no two blocks are adjacent.
        piece_kib: size of each piece.
        road: "copy engine", or "kernel" for pieces smaller than `copy_engine_bytes`.
        link_ms: time on the link.
        load_sm_ms: compute used by a load: 0 with the copy engine, otherwise a kernel that reads pinned memory directly.
        store_sm_ms: compute used by a store: the gather into staging memory, which reads and writes device memory once.
    """

    model: str
    link: str
    megabytes: float
    descriptors: int
    piece_kib: float
    road: str
    link_ms: float
    load_sm_ms: float
    store_sm_ms: float


def estimates(tokens: int = 1000) -> Iterator[Estimate]:
    """Yields the estimate of every model over every link."""
    copy_engine_bytes = parse_size(Config.copy_engine_bytes)
    for model in MODELS:
        nbytes = model.token_bytes * tokens
        by_engine = model.page_bytes >= copy_engine_bytes
        for link in LINKS:
            link_ms = nbytes / link.gbs / 1e6
            readers = ceil(link.gbs * 1e3 * link.latency_us / SM_BYTES_IN_FLIGHT)  # Little's law
            yield Estimate(
                model=model.name,
                link=link.name,
                megabytes=nbytes / 1e6,
                descriptors=ceil(tokens / model.block_tokens) * model.layers,
                piece_kib=model.page_bytes / 1024,
                road="copy engine" if by_engine else "kernel",
                link_ms=link_ms,
                load_sm_ms=0.0 if by_engine else readers * link_ms,
                store_sm_ms=SMS * 2 * nbytes / HBM_GBS / 1e6,
            )
