"""KV events: publishes this cache's contents in vLLM's own event stream, for cache-aware routers."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from lmcache.keys import Chain

if TYPE_CHECKING:
    from vllm.v1.request import Request

_KEPT = 1 << 17
"""Maximum chunks whose block hashes are kept; older chunks are removed without an event."""


class Events:
    """Collects events. They name a chunk by vLLM's hashes of its blocks, which are known from requests only.

    Args:
        chunk_tokens: tokens per chunk.
        block_tokens: tokens per block hash of vLLM.
    """

    def __init__(self, chunk_tokens: int, block_tokens: int) -> None:
        self._chunk = chunk_tokens
        self._block = block_tokens
        self._chunks: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._events: list[BlockStored | BlockRemoved] = []

    def learn(self, request: Request, chain: Chain, first: int) -> None:
        """Records vLLM's block hashes of the chunks of a chain from position `first` on."""
        hashes, tokens = request.block_hashes, request.all_token_ids
        per = self._chunk // self._block
        for position in range(first, len(chain.digests)):
            blocks = hashes[position * per : (position + 1) * per]
            if len(blocks) < per:
                return
            start = position * self._chunk
            self._chunks[chain.digests[position]] = {
                "block_hashes": [maybe_convert_block_hash(block) for block in blocks],
                "parent_block_hash": maybe_convert_block_hash(hashes[position * per - 1]) if position else None,
                "token_ids": list(tokens[start : start + self._chunk]),
                "lora_name": request.lora_request.lora_name if request.lora_request else None,
            }
        while len(self._chunks) > _KEPT:
            self._chunks.popitem(last=False)

    def notice(self, there: bool, place: str, namespace: bytes, group: int, digest: bytes) -> None:
        """Records that a chunk was added to (`there`) or removed from a place; see `Index.on_change`."""
        known = self._chunks.get(digest)
        if known is None:
            return
        medium = MEDIUM_CPU if place == "dram" else MEDIUM_STORAGE
        if there:
            self._events.append(
                BlockStored(block_size=self._block, lora_id=None, medium=medium, group_idx=group, **known)
            )
        else:
            self._events.append(BlockRemoved(block_hashes=known["block_hashes"], medium=medium, group_idx=group))

    def take(self) -> list[BlockStored | BlockRemoved]:
        """Returns the events since the last call."""
        taken, self._events = self._events, []
        return taken
