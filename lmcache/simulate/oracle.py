"""Baselines outside the control plane: the optimal and the infinite cache as upper bounds, and textbook LRU."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from lmcache.simulate.trace import Trace

_NEVER = 1 << 62


def optimum(trace: Trace, capacity: int, *, chained: bool = False) -> Iterator[int]:
    """Yields the number of leading chunks found for each request by a cache that knows the future (Belady 1966).

    It evicts the chunk whose next use is farthest in the future, and keeps no chunk that is not used again. Chunks of one
    prompt have the same next use; Belady does not define the order among them. Here the first chunk of the prompt is evicted
    first, as if chunks were independent; with `chained` the last one, which leaves a usable prefix and so gives more hits.
    """
    following = _next_uses(trace)
    order = -1 if chained else 1
    resident: dict[int, tuple[int, int]] = {}  # chunk → its current key in the heap
    heap: list[tuple[tuple[int, int], int]] = []  # an entry whose key differs from `resident` is stale
    at = 0
    for request in trace:
        yield next((i for i, block in enumerate(request.blocks) if block not in resident), len(request.blocks))
        for position, block in enumerate(request.blocks):
            again = following[at]
            at += 1
            if again == _NEVER:
                resident.pop(block, None)
            else:
                resident[block] = key = (-again, order * position)
                heapq.heappush(heap, (key, block))
        while len(resident) > capacity:
            key, block = heapq.heappop(heap)
            if resident.get(block) == key:
                del resident[block]


def infinite(trace: Trace) -> Iterator[int]:
    """Yields the number of leading chunks found for each request by a cache that keeps everything."""
    seen = bytearray(trace.blocks)
    for request in trace:
        first = next((i for i, block in enumerate(request.blocks) if not seen[block]), len(request.blocks))
        yield first
        for block in request.blocks[first:]:
            seen[block] = 1


def textbook_lru(trace: Trace, capacity: int) -> Iterator[int]:
    """Yields the number of leading chunks found for each request by LRU over independent chunks.

    It evicts the beginning of a prompt before its end. The control plane's `lru` evicts from the end.
    """
    resident: OrderedDict[int, None] = OrderedDict()
    for request in trace:
        yield next((i for i, block in enumerate(request.blocks) if block not in resident), len(request.blocks))
        for block in request.blocks:
            resident[block] = None
            resident.move_to_end(block)
        while len(resident) > capacity:
            resident.popitem(last=False)


def _next_uses(trace: Trace) -> list[int]:
    """Returns, per access, the index of the next request that uses the same chunk; `_NEVER` if there is none."""
    accesses = [(block, number) for number, request in enumerate(trace) for block in request.blocks]
    following = [_NEVER] * len(accesses)
    later: dict[int, int] = {}
    for at in range(len(accesses) - 1, -1, -1):
        block, number = accesses[at]
        following[at] = later.get(block, _NEVER)
        later[block] = number
    return following
