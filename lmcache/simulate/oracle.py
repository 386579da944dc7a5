"""What no real cache reaches, and what every one should: bounds and a textbook baseline, apart from the control plane."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from lmcache.simulate.trace import Trace

_NEVER = 1 << 62


def optimum(trace: Trace, capacity: int, *, chained: bool = False) -> Iterator[int]:
    """Leading chunks found of each request by a cache that knows the future (Belady 1966): it evicts the chunk whose next
    use is farthest, and keeps nothing that is not used again.

    Chunks of one prompt are next used together. Belady leaves open which of them goes first: here the first of the prompt,
    as if chunks knew nothing of each other; with `chained` the last, which leaves a prefix and so finds more.
    """
    following = _next_uses(trace)
    order = -1 if chained else 1
    resident: dict[int, tuple[int, int]] = {}  # chunk → its key in the heap
    heap: list[tuple[tuple[int, int], int]] = []  # stale where `resident` says otherwise
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
    """Leading chunks found of each request by a cache that keeps everything."""
    seen = bytearray(trace.blocks)
    for request in trace:
        first = next((i for i, block in enumerate(request.blocks) if not seen[block]), len(request.blocks))
        yield first
        for block in request.blocks[first:]:
            seen[block] = 1


def textbook_lru(trace: Trace, capacity: int) -> Iterator[int]:
    """Leading chunks found of each request by least-recently-used over single chunks that know nothing of each other.

    It evicts the beginning of a prompt before its end. The control plane's own `lru` evicts from the end.
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
    """Per access, the number of the next request that uses the same chunk."""
    accesses = [(block, number) for number, request in enumerate(trace) for block in request.blocks]
    following = [_NEVER] * len(accesses)
    later: dict[int, int] = {}
    for at in range(len(accesses) - 1, -1, -1):
        block, number = accesses[at]
        following[at] = later.get(block, _NEVER)
        later[block] = number
    return following
