"""Estimates time to first token with a FIFO queue: each request is served alone by the first of `servers` that is free."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def ttft(arrivals: Sequence[float], service: Sequence[float], servers: int) -> list[float]:
    """Returns the seconds from arrival to end of service, per request. `arrivals` must not decrease."""
    free = [-math.inf] * min(servers, len(arrivals))
    waits = []
    for arrival, seconds in zip(arrivals, service, strict=True):
        end = max(arrival, free[0]) + seconds
        heapq.heapreplace(free, end)
        waits.append(end - arrival)
    return waits


def servers_for(arrivals: Sequence[float], service: Sequence[float], load: float = 0.8) -> int:
    """Returns the smallest number of servers with a utilization of at most `load`; at most one per request."""
    span = arrivals[-1] - arrivals[0] if arrivals else 0.0
    return max(1, math.ceil(min(len(arrivals), sum(service) / (load * span)))) if span > 0 else 1


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of the values do not exceed; 0 if there are none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0
