"""Time to first token by a queue: requests in order of arrival, each served alone by the first of `servers` to be free."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def ttft(arrivals: Sequence[float], service: Sequence[float], servers: int) -> list[float]:
    """Seconds from arrival to the end of service, per request. `arrivals` do not go back."""
    free = [-math.inf] * min(servers, len(arrivals))
    waits = []
    for arrival, seconds in zip(arrivals, service, strict=True):
        end = max(arrival, free[0]) + seconds
        heapq.heapreplace(free, end)
        waits.append(end - arrival)
    return waits


def servers_for(arrivals: Sequence[float], service: Sequence[float], load: float = 0.8) -> int:
    """The fewest servers that are busy at most `load` of the time; never more than there are requests."""
    span = arrivals[-1] - arrivals[0] if arrivals else 0.0
    return max(1, math.ceil(min(len(arrivals), sum(service) / (load * span)))) if span > 0 else 1


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; 0 of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0
