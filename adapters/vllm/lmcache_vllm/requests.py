"""State of one request of the connector's scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lmcache.control.outcomes import StopReason
from lmcache.keys import Extra
from lmcache.plan import Chain

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Tracked:
    """State of one request.

    Attributes:
        chain: names of its full chunks so far.
        local: tokens that vLLM has computed itself, as of the last lookup.
        prefetch: the job that loads the hit into DRAM, 0 if there is none.
        prefetched: such a job was started.
        spent: such a job failed; the request gets no other.
        lacking: the queued request found no room in DRAM.
        asked: vLLM has asked about the request.
        until: when it ceases to wait for room in DRAM, in seconds.
        found: tokens of the hit, wherever they are; `sources`: by tier, before any of it was prefetched.
        stop: why the hit ends.
        stored: number of chunks whose store was planned or skipped.
        offered: the answer to vLLM, until blocks are allocated.
        expected: leading tokens that need no computation, by vLLM's cache and ours, until the first step after the allocation.
        computed: leading tokens that were not computed for this request.
        foreign: the chunk from which on the KV is, or depends on, another connector's.
        counted: the request is in the metrics, or will never be.
    """

    __slots__ = (
        "asked",
        "chain",
        "computed",
        "counted",
        "expected",
        "extras",
        "foreign",
        "found",
        "lacking",
        "local",
        "lora",
        "offered",
        "prefetch",
        "prefetched",
        "request",
        "salt",
        "sources",
        "spent",
        "stop",
        "stored",
        "until",
    )

    def __init__(self, request: Request, salt: str, lora: str, extras: tuple[Extra, ...]) -> None:
        self.request = request
        self.salt = salt
        self.lora = lora
        self.extras = extras
        self.chain: Chain | None = None
        self.local = 0
        self.offered: int | None = None
        self.expected: int | None = None
        self.computed = 0
        self.foreign: int | None = None
        self.prefetch = 0
        self.prefetched = False
        self.spent = False
        self.lacking = False
        self.asked = False
        self.until = 0.0
        self.found = 0
        self.sources: Mapping[str, int] = {}
        self.stop: StopReason | None = None
        self.stored = 0
        self.counted = False


def last_of(by_tier: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Returns the last `tokens` tokens of a hit, by tier; `by_tier` is nearest first. Tokens beyond the hit count as DRAM."""
    found: dict[str, int] = {}
    for tier, count in reversed(list(by_tier.items())):
        if tokens > 0:
            found[tier] = min(count, tokens)
            tokens -= found[tier]
    if tokens > 0:
        found["dram"] = found.get("dram", 0) + tokens
    return found


def resident_chunks(blocks: list[int], block_tokens: int, chunk_tokens: int, chunks: int) -> list[bool]:
    """Returns for each of the first `chunks` chunks whether all its blocks are allocated and none is the null block."""
    per = chunk_tokens // block_tokens
    return [(i + 1) * per <= len(blocks) and all(blocks[i * per : (i + 1) * per]) for i in range(chunks)]
