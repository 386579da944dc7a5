"""What moving KV costs on a GPU, by arithmetic: a prediction to hold the first measurements against.

Three numbers per 1,000 tokens: how long the link is busy, how many descriptors the copy engine is given, and how much of the
GPU's compute is taken away from the forward pass (SM-milliseconds; a GPU of 132 SMs has 132 of them each millisecond).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from lmcache_kernels import DMA_BYTES


@dataclass(frozen=True)
class Model:
    """KV of one rank.

    Attributes:
        name: model and parallelism.
        layers: layers of this rank.
        page_bytes: contiguous bytes of one block of one layer.
        block_tokens: tokens of a block.
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
    """A model whose pages hold K‖V of all its heads, as vLLM's do."""
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
    """A road between host and GPU memory.

    Attributes:
        name: what it is called.
        gbs: GB/s in one direction that large copies reach.
        latency_us: from a load instruction to its data, which a kernel that reads host memory has to hide.
    """

    name: str
    gbs: float
    latency_us: float


LINKS = (Link("PCIe 4 ×16", 25.0, 1.5), Link("PCIe 5 ×16", 52.0, 1.5), Link("NVLink-C2C", 380.0, 1.0))

SMS = 132
HBM_GBS = 3350.0
"""An H100 SXM."""

SM_BYTES_IN_FLIGHT = 64 << 10
"""What the run kernels have under way on one SM: 16 bytes × 4 a thread, 128 threads, 8 programs (see `--aot`)."""


@dataclass(frozen=True)
class Estimate:
    """Cost of 1,000 tokens of one model over one link.

    Attributes:
        model, link: names.
        megabytes: bytes moved.
        descriptors: pieces contiguous on both sides where no two blocks are neighbours.
        piece_kib: size of each.
        road: "copy engine", or "kernel" where pieces are below `copy_engine_bytes`.
        link_ms: time on the link.
        load_sm_ms: compute taken by a load: none by the copy engine; else a kernel that reads pinned memory directly.
        store_sm_ms: compute taken by a store: the gather into staging memory, which reads and writes device memory once.
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
    """Every model over every link."""
    for model in MODELS:
        nbytes = model.token_bytes * tokens
        by_engine = model.page_bytes >= DMA_BYTES
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
