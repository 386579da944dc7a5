"""Runs one simulation (trace, policy, capacities per tier): hits, bytes moved and written, and waiting times."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lmcache.config import Config
from lmcache.config.settings import named
from lmcache.control import Index, TierInfo
from lmcache.control.admission.rules import Adaptive, BreakEven, SecondHit
from lmcache.control.eviction import POLICIES
from lmcache.control.state import Admit
from lmcache.errors import ConfigError
from lmcache.plan import Chain, Name
from lmcache.simulate import oracle
from lmcache.simulate.hardware import Profile
from lmcache.simulate.queueing import percentile, servers_for, ttft
from lmcache.simulate.replay import Replay
from lmcache.simulate.trace import Request, Trace
from lmcache.spec import ALL

BOUNDS: Mapping[str, Callable[[Trace, int], Iterator[int]]] = {
    "lru-textbook": oracle.textbook_lru,
    "optimum": oracle.optimum,
    "optimum-chained": lambda trace, capacity: oracle.optimum(trace, capacity, chained=True),
    "infinite": lambda trace, capacity: oracle.infinite(trace),
}
"""Baselines outside the control plane: name → (trace, capacity) → leading chunks found per request."""

PLACES = ("device", "dram", "disk")
ADMISSIONS = {
    "all": "everything, as it is stored (write-through)",
    "second": "when full, only chunks that are computed a second time",
    "adaptive": "when full, `all` or `second`, whichever is measured to give more hits",
    "break-even": "as `adaptive`, but nothing that is faster to recompute than to load",
}
"""Admission rules of the disk tier: name → what is written."""

_NAMESPACE = b"trace".ljust(32, b".")
Progress = Callable[[int], None]


class Result(NamedTuple):
    """Result of one simulation. Rates are in [0, 1]; seconds, chunks and bytes are totals over the trace."""

    policy: str
    capacity_chunks: int
    capacity_bytes: int
    capacities: dict[str, int]
    hit_rate: float
    hit_rate_tokens: float
    hit_rate_requests: float
    hits: dict[str, int]
    evictions: int
    prefill_s: float
    prefill_saved_s: float
    load_s: float
    bytes_loaded: dict[str, int]
    bytes_stored: int
    disk_written_chunks: int
    disk_written_bytes: int
    servers: int
    ttft_p50_s: float
    ttft_p99_s: float
    accesses_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Returns the result as plain values."""
        return self._asdict()


def known_policies() -> dict[str, object]:
    """Returns every policy name that `simulate` accepts."""
    return {**POLICIES, **BOUNDS}


def simulate(
    trace: Trace,
    policy: str,
    capacities: Mapping[str, int],
    profile: Profile,
    *,
    servers: int | None = None,
    admit: str = Config.admission,
    progress: Progress | None = None,
) -> Result:
    """Simulates `trace` once.

    Args:
        trace: the requests.
        policy: an eviction policy of the index, or one of `BOUNDS` (with a single tier of the total capacity).
        capacities: chunks per place; places are `PLACES`.
        profile: model and device.
        servers: engines that share the cache; default: the fewest that would be at most 80 % busy without a cache.
        admit: the disk tier's admission rule, one of `ADMISSIONS`.
        progress: called periodically with the number of requests done.

    Raises:
        ConfigError: an unknown policy, place or admission rule, or an invalid capacity.
    """
    named(policy, known_policies(), "policy")
    named(admit, ADMISSIONS, "admission")
    for place, chunks in capacities.items():
        named(place, dict.fromkeys(PLACES), "tier")
        if chunks < 1:
            raise ConfigError(
                f"{place}: room for {chunks} chunks of {trace.chunk_tokens} tokens; give at least one chunk"
            )
    if not capacities:
        raise ConfigError("no capacity is given")
    started = time.perf_counter()
    if policy in BOUNDS:
        total = trace.blocks if policy == "infinite" else sum(capacities.values())
        capacities = {"dram": total}
        counts = Counter[str]()
        served = [{"dram": hit} for hit in BOUNDS[policy](trace, total)]
    else:
        plane = ControlPlane(trace, policy, capacities, profile, admit)
        served = []
        for number, request in enumerate(trace):
            served.append(plane.request(request))
            if progress is not None and number % 4096 == 0:
                progress(number)
        counts = plane.counts
        counts["evictions"] = plane.index.evictions
    seconds = time.perf_counter() - started
    return _sum_up(trace, policy, capacities, profile, servers, served, counts, trace.accesses / max(seconds, 1e-9))


class ControlPlane:
    """The index driven as an engine would, together with the engine's own prefix cache and a disk tier of bounded size.

    `counts`: chunks `stored` in DRAM and `written` to disk.
    """

    def __init__(
        self, trace: Trace, policy: str, capacities: Mapping[str, int], profile: Profile, admit: str = Config.admission
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._names = [block.to_bytes(32, "little") for block in range(trace.blocks)]
        device = capacities.get("device")
        # The engine's own prefix cache is LRU and evicts the end of a prompt first: an index with that policy and no tiers.
        self._device = Replay(Index([("kv", ALL)], trace.chunk_tokens, [device], policy="lru")) if device else None
        self._disk = Disk(capacities["disk"], self._forget) if "disk" in capacities else None
        self.index = Index(
            [("kv", ALL)],
            trace.chunk_tokens,
            [capacities.get("dram", 0)],
            policy=policy,
            tiers=[TierInfo("disk")] if self._disk else [],
            admit=_admission(admit, self._disk, profile, trace.chunk_tokens) if self._disk else None,
        )
        self._replay = Replay(self.index, written=self._write, used=self._use)

    def request(self, request: Request) -> dict[str, int]:
        """Serves one request; returns its leading chunks found, by place."""
        names = self._names
        chain = Chain(_NAMESPACE, [names[block] for block in request.blocks])
        own = self._device.request(chain).chunks if self._device else 0
        found = self._replay.request(chain)
        self.counts["stored"] += found.stored
        if not own and not found.tiers:
            return {"dram": found.dram} if found.dram else {}
        hits = {"device": own, "dram": found.dram, "disk": found.tiers.get(0, 0)}
        if own:  # chunks in the engine's own cache are not loaded
            hits["dram"] = max(0, found.dram - own)
            hits["disk"] = max(0, found.chunks - max(own, found.dram))
        return {place: chunks for place, chunks in hits.items() if chunks}

    def _write(self, tier: int, name: Name) -> None:
        self.counts["written"] += 1
        assert self._disk is not None
        self._disk.put(name)

    def _use(self, tier: int, name: Name) -> None:
        assert self._disk is not None
        self._disk.use(name)

    def _forget(self, name: Name) -> None:
        self._replay.lost(0, name)


class Disk:
    """The names of objects in a disk tier of bounded size, with LRU eviction as in the real tier."""

    def __init__(self, capacity: int, lost: Callable[[Name], None]) -> None:
        self.capacity = capacity
        self._names: OrderedDict[Name, None] = OrderedDict()
        self._lost = lost

    def has_room(self, tier: int) -> bool:
        """Returns whether another object fits without evicting one."""
        return len(self._names) < self.capacity

    def put(self, name: Name) -> None:
        """Records a write; calls `lost` if it evicts an object."""
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self.capacity:
            self._lost(self._names.popitem(last=False)[0])

    def use(self, name: Name) -> None:
        """Records a read."""
        if name in self._names:
            self._names.move_to_end(name)


def _admission(admit: str, disk: Disk, profile: Profile, chunk_tokens: int) -> Admit | None:
    if admit == "all":
        return None
    if admit == "second":
        return SecondHit(disk.has_room, {0: disk.capacity})
    adaptive = Adaptive(disk.has_room, {0: disk.capacity})
    if admit == "adaptive":
        return adaptive
    rule = BreakEven(lambda group: profile.kv_bytes * chunk_tokens, adaptive)
    for _ in range(BreakEven.FEW):
        rule.computed(chunk_tokens, profile.prefill_s(0, chunk_tokens))
        rule.loaded(0, profile.kv_bytes * chunk_tokens, profile.load_s("disk", chunk_tokens))
    return rule


def _sum_up(
    trace: Trace,
    policy: str,
    capacities: Mapping[str, int],
    profile: Profile,
    servers: int | None,
    served: list[dict[str, int]],
    counts: Counter[str],
    speed: float,
) -> Result:
    hits: Counter[str] = Counter()
    tokens = hit_tokens = hit_requests = 0
    prefill = loading = 0.0
    plain: list[float] = []
    cached: list[float] = []
    for request, found in zip(trace, served, strict=True):
        hits.update(found)
        chunks = sum(found.values())
        # The last prompt token is always computed: its output is the first answer.
        start = min(chunks * trace.chunk_tokens, max(0, request.tokens - 1))
        tokens += request.tokens
        hit_tokens += start
        hit_requests += chunks > 0
        load = sum(profile.load_s(place, n * trace.chunk_tokens) for place, n in found.items())
        plain.append(profile.prefill_s(0, request.tokens))
        own = profile.prefill_s(start, request.tokens)
        cached.append(own + load)
        prefill += own
        loading += load
    arrivals = [request.time for request in trace]
    servers = servers or servers_for(arrivals, plain)
    waits = ttft(arrivals, cached, servers)
    size = profile.kv_bytes * trace.chunk_tokens
    room = sum(capacities.values())
    return Result(
        policy=policy,
        capacity_chunks=room,
        capacity_bytes=room * size,
        capacities=dict(capacities),
        hit_rate=sum(hits.values()) / max(1, trace.accesses),
        hit_rate_tokens=hit_tokens / max(1, tokens),
        hit_rate_requests=hit_requests / max(1, len(trace)),
        hits=dict(hits),
        evictions=counts["evictions"],
        prefill_s=prefill,
        prefill_saved_s=sum(plain) - prefill,
        load_s=loading,
        bytes_loaded={place: n * size for place, n in hits.items() if place != "device"},
        bytes_stored=counts["stored"] * size,
        disk_written_chunks=counts["written"],
        disk_written_bytes=counts["written"] * size,
        servers=servers,
        ttft_p50_s=percentile(waits, 0.5),
        ttft_p99_s=percentile(waits, 0.99),
        accesses_per_s=speed,
    )
