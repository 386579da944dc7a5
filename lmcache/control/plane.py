"""The control plane of one engine: an `Index` with namespaces, admission, trace recording and metrics.

An integration opens the data plane of each rank (`lmcache.transfer.rank`), creates a `Plane` from the slots and tiers that the
ranks report, and passes plans and reports between them: `lmcache.driver` within a process, vLLM's connector across processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lmcache.config import Config
from lmcache.control.admission import Admission
from lmcache.control.index import Index
from lmcache.control.namespaces import Namespaces
from lmcache.control.outcomes import Finished, FlushResult, Owner, StopReason, Store, TierInfo
from lmcache.observe.metrics import Metrics
from lmcache.observe.recorder import Recorder
from lmcache.plan import Chain, Plan, Report, TierFacts
from lmcache.spec import KVSpec


class Plane(Index):
    """The control plane of one engine, for all of its ranks. Single-threaded like `Index`; `names` is thread-safe.

    Args:
        config: settings.
        specs: the spec of each rank.
        slots: arena slots of each group, the same on every rank.
        tiers: the tiers below DRAM, nearest first.
        metrics: counts requests, stores and evictions.
        chunk_tokens: tokens per chunk, if the engine's blocks require another number than `config.chunk_tokens`.
        patience: see `Index`.

    Attributes:
        names: the namespaces of this model.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[KVSpec],
        slots: Sequence[int],
        tiers: Sequence[TierInfo],
        metrics: Metrics,
        *,
        chunk_tokens: int | None = None,
        patience: float = 0.0,
    ) -> None:
        spec = specs[0]
        chunk = chunk_tokens or config.chunk_tokens
        self.metrics = metrics
        self.names = Namespaces(spec, chunk, config.share, self._holds)
        self.admission = Admission(config, specs, chunk, [tier.usable_bytes for tier in tiers])
        self._recorder = Recorder(config.record_trace, chunk) if config.record_trace else None
        self._counted_evictions = self._counted_refusals = 0
        self._receipts = 0, 0  # written and present objects up to the last flush
        super().__init__(
            [(group.name, group.rule) for group in spec.groups],
            chunk,
            slots,
            ranks=len(specs),
            tiers=tiers,
            policy=config.policy,
            lease_ttl=config.lease_s,
            load_deadline=config.load_timeout_s,
            probe_deadline=config.probe_timeout_s,
            patience=patience,
            admit=self.admission if self.admission.active else None,
        )

    def _holds(self, namespace: bytes) -> bool:
        """Whether objects of a namespace are in DRAM, or known to be on a tier."""
        state = self.state
        if any(namespace in pool.spaces for pool in state.pools):
            return True
        return any(d.masks(namespace, group) for d in state.directories for group in range(len(state.pools)))

    # ---------------------------------------------------------------- with metrics

    def begin_store(
        self,
        owner: Owner,
        chain: Chain,
        *,
        first: int,
        last: int,
        now: float,
        resident: Sequence[Sequence[bool]] | None = None,
    ) -> Store:
        """See `Index.begin_store`. Counts accepted tokens, and skipped objects by reason."""
        store = super().begin_store(owner, chain, first=first, last=last, now=now, resident=resident)
        for reason, objects in store.skipped.items():
            self.metrics.skipped_store(reason, objects)
        if store.accepted:
            self.metrics.stored(store.accepted)
        return store

    def apply(self, reports: Iterable[Report], facts: Mapping[int, Sequence[TierFacts]], now: float) -> list[Finished]:
        """Applies reports and tier measurements of the ranks; returns the jobs that ended."""
        for rank, measured in facts.items():
            self.admission.measured(rank, measured)
        return [finished for report in reports for finished in self.report(report, now)]

    def advance(
        self, reports: Iterable[Report], facts: Mapping[int, Sequence[TierFacts]], now: float
    ) -> tuple[list[Finished], Plan]:
        """Calls `tick` and `apply`; returns the jobs that ended, and the plan for the ranks.

        Also counts evictions and refused write-backs since the last call.
        """
        finished = [*self.tick(now), *self.apply(reports, facts, now)]
        evicted, refused = 0, self.state.counts["refused"]
        for pool in self.state.pools:
            evicted += pool.evictions
        if evicted != self._counted_evictions:
            self.metrics.evicted("dram", evicted - self._counted_evictions)
            self._counted_evictions = evicted
        if refused != self._counted_refusals:
            self.metrics.skipped_store("admission", refused - self._counted_refusals)
            self._counted_refusals = refused
        return finished, self.state.jobs.take_plan()

    # ---------------------------------------------------------------- trace and request metrics

    def record(self, tokens: int, chain: Chain) -> None:
        """Appends a request of `tokens` prompt tokens to the recorded trace, if `record_trace` is set."""
        if self._recorder is not None:
            self._recorder.record(tokens, chain.digests)

    def count_request(
        self, total: int, tokens: int, by_tier: Mapping[str, int], stop: StopReason, *, local: int = 0
    ) -> None:
        """Counts the requested tokens and the hit and missed tokens of a request.

        Args:
            total: tokens of the prompt.
            tokens: length of the hit, including `local`.
            by_tier: tokens of the hit beyond `local`, by source.
            stop: why the hit ends.
            local: leading tokens already resident in the engine; they count neither as requested nor as hit.
        """
        missed: dict[str, int] = {}
        whole, tokens = total - total % self.state.chunk_tokens, max(tokens, local)
        if tokens < whole:
            missed[stop.metric] = whole - tokens
        if (tail := total - max(whole, tokens)) > 0:
            missed["tail"] = missed.get("tail", 0) + tail
        self.metrics.looked_up(total - local, by_tier, missed)

    def take_receipts(self) -> FlushResult:
        """Returns what became of write-backs since the last call. Objects that are still only in DRAM stay to be written."""
        counts, unwritten = self.state.counts, self.state.unwritten
        dropped = dict(Counter(unwritten.values()))
        if forgotten := counts.pop("unwritten_forgotten", 0):
            dropped["forgotten"] = forgotten
        for key in [key for key, reason in unwritten.items() if not self.state.may_be_written(key[1], reason)]:
            del unwritten[key]
        now = counts["written"], counts["present"]
        before, self._receipts = self._receipts, now
        return FlushResult(now[0] - before[0], now[1] - before[1], dropped)

    def close(self) -> None:
        """Closes the recorded trace."""
        if self._recorder is not None:
            self._recorder.close()
