"""KV events: publishes this cache's contents in vLLM's own event stream, for cache-aware routers."""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, NamedTuple

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from lmcache.keys import Chain

if TYPE_CHECKING:
    from vllm.v1.request import Request

_KEPT_BYTES = 256 << 20
"""Memory for what is known of chunks: 1.9 KiB for one of 256 tokens in blocks of 16, so that 140,000 of them are kept."""

_ENTRY_BYTES = 260
"""Memory of a chunk besides its hashes and tokens: the tuple, the digest, the entry of the dictionary."""


class _Known(NamedTuple):
    """What vLLM calls a chunk.

    Attributes:
        parent: hash of the block before it, empty if there is none.
        hashes: hashes of its blocks, one after the other.
        tokens: its tokens, as u32.
        lora: name of the LoRA.
    """

    parent: bytes
    hashes: bytes
    tokens: bytes
    lora: str | None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sys.getsizeof(self.parent) + sys.getsizeof(self.hashes) + sys.getsizeof(self.tokens) + _ENTRY_BYTES


class Events:
    """Collects events. They name a chunk by vLLM's hashes of its blocks, which are known from requests only.

    Args:
        chunk_tokens: tokens per chunk.
        block_tokens: tokens per block hash of vLLM.
        limit: bytes that may be kept; the chunks that were learnt first are forgotten, without an event.
    """

    def __init__(self, chunk_tokens: int, block_tokens: int, limit: int = _KEPT_BYTES) -> None:
        self._chunk = chunk_tokens
        self._block = block_tokens
        self._limit = limit
        self._chunks: dict[bytes, _Known] = {}
        self._events: list[BlockStored | BlockRemoved] = []
        self.nbytes = 0

    def learn(self, request: Request, chain: Chain, first: int) -> None:
        """Records vLLM's block hashes of the chunks of a chain from position `first` on."""
        hashes, tokens = request.block_hashes, request.all_token_ids
        lora = request.lora_request.lora_name if request.lora_request else None
        per = self._chunk // self._block
        for position in range(first, len(chain.digests)):
            blocks = hashes[position * per : (position + 1) * per]
            if len(blocks) < per:
                break
            start = position * self._chunk
            ids = array("I", tokens[start : start + self._chunk]).tobytes()
            parent = hashes[position * per - 1] if position else b""
            self._forget(chain.digests[position])
            self._chunks[chain.digests[position]] = known = _Known(parent, b"".join(blocks), ids, lora)
            self.nbytes += known.nbytes
        while self.nbytes > self._limit:
            self._forget(next(iter(self._chunks)))

    def _forget(self, digest: bytes) -> None:
        known = self._chunks.pop(digest, None)
        if known is not None:
            self.nbytes -= known.nbytes

    def notice(self, there: bool, place: str, namespace: bytes, group: int, digest: bytes) -> None:
        """Records that a chunk was added to (`there`) or removed from a place; see `Index.on_change`."""
        known = self._chunks.get(digest)
        if known is None:
            return
        medium = MEDIUM_CPU if place == "dram" else MEDIUM_STORAGE
        size = len(known.hashes) * self._block // self._chunk
        blocks = [_external(known.hashes[at : at + size]) for at in range(0, len(known.hashes), size)]
        if not there:
            self._events.append(BlockRemoved(block_hashes=blocks, medium=medium, group_idx=group))
            return
        self._events.append(
            BlockStored(
                block_hashes=blocks,
                parent_block_hash=_external(known.parent) if known.parent else None,
                token_ids=array("I", known.tokens).tolist(),
                block_size=self._block,
                lora_id=None,
                lora_name=known.lora,
                medium=medium,
                group_idx=group,
            )
        )

    def take(self) -> list[BlockStored | BlockRemoved]:
        """Returns the events since the last call."""
        taken, self._events = self._events, []
        return taken


def _external(block: bytes) -> bytes | int:
    found: bytes | int = maybe_convert_block_hash(BlockHash(block))
    return found
