"""The scheduler half: the index of one engine, asked by vLLM's scheduler; plans go to the workers, reports come back.

It never waits. A request's hit is offered only when all of it is verified and in DRAM on every rank, so that a load cannot
fail once vLLM counts on it: what lies on lower tiers is fetched first, while vLLM is told to ask again later. What a forward
pass completes is stored in the same step, before vLLM can give its blocks to somebody else.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcache.config import Config
from lmcache.control import Finished, Index, TierInfo
from lmcache.control.admission import Admission
from lmcache.control.outcomes import ABSENT, FAILED_BEFORE, GROUP, LATE, MAX_TOKENS, PROBING, WRITING
from lmcache.errors import TokenError
from lmcache.keys import Chain, Extra, as_tokens, chain_of, namespace_of
from lmcache.observe.log import Throttle, event, info
from lmcache.observe.metrics import Metrics
from lmcache.observe.recorder import Recorder
from lmcache.plan import Status, TierFacts
from lmcache.spec import KVSpec
from lmcache_vllm import compat, names
from lmcache_vllm.events import Events
from lmcache_vllm.geometry import rounded_chunk
from lmcache_vllm.messages import BlockView, ClearRequest, Offer, RankMeta, StepMeta, agreed

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_NAMESPACES_KEPT = 1 << 16
_PATIENCE_S = 60.0
"""Workers answer with the step that follows; a step with a long prefill takes its time, which is no fault of a tier's."""

_STALLED_S = 30.0
"""Work that has brought no news for so long no longer keeps an idle engine stepping."""

_MISS_REASONS = {MAX_TOKENS: "tail", PROBING: "pending", WRITING: "pending", LATE: "failed", FAILED_BEFORE: "failed"}


class Tracked:
    """What is known of one request."""

    __slots__ = (
        "chain",
        "counted",
        "extras",
        "fetched",
        "fetching",
        "found",
        "local",
        "namespace",
        "request",
        "sources",
        "stop",
        "stored",
    )

    def __init__(self, request: Request, namespace: bytes, extras: tuple[Extra, ...]) -> None:
        self.request = request
        self.namespace = namespace
        self.extras = extras
        self.chain = Chain(namespace, [])
        self.local = 0  # tokens that vLLM has itself, as it said when it last asked
        self.fetching = 0  # the job that fetches into DRAM, 0: there is none
        self.fetched = False
        self.found = 0  # tokens of the hit before it was fetched
        self.sources: Mapping[str, int] = {}  # where the hit lay before it was fetched
        self.stop = ""
        self.stored = 0  # chunks that were handed over to be stored
        self.counted = False


class ConnectorScheduler:
    """See the module.

    Args:
        kv_config: as vLLM hands it to a connector.
        config: settings.
        events: collect KV events.
    """

    def __init__(self, kv_config: KVCacheConfig, config: Config, *, events: bool = False) -> None:
        self._config = config
        self._chunk = rounded_chunk(kv_config, config.chunk_tokens)
        self._sizes = [int(group.kv_cache_spec.block_size) for group in kv_config.kv_cache_groups]
        hashed = getattr(kv_config, "hash_block_size", None) or min(self._sizes)
        self.events = Events(self._chunk, hashed) if events else None
        self._log = Throttle()
        self._recorder = Recorder(config.record_trace, self._chunk) if config.record_trace else None
        self.metrics = Metrics()
        self.disabled = "the workers have not said what they hold"
        self._index: Index | None = None
        self._spec: KVSpec | None = None
        self._requests: dict[str, Tracked] = {}
        self._tables = compat.BlockTables()
        self._namespaces: dict[tuple[str, str], bytes] = {}
        self._version = ""
        self._views: dict[int, BlockView] = {}
        self._refused: list[BlockView] = []
        self._clear_requests: list[ClearRequest] = []
        self._clears_asked = 0
        self._cleared: dict[int, int] = {}
        self._ranks = 1
        self._evictions = self._not_written = 0
        self._admission: Admission | None = None
        self._news = 0.0

    # ---------------------------------------------------------------- start-up

    def meet(self, offers: Iterable[Offer]) -> None:
        """The workers have opened their tiers: now there is something to decide about."""
        found = sorted(offers, key=lambda offer: offer.rank)
        self.disabled = agreed(found)
        if self.disabled:
            self._log.warning("cache-disabled", reason=self.disabled)
            return
        spec = found[0].spec
        assert spec is not None
        self._spec = spec
        self._ranks = len(found)
        admission = Admission(
            self._config, [offer.spec for offer in found if offer.spec is not None], self._chunk, found[0].capacities
        )
        self._admission = admission if admission.active else None
        self._measured({offer.rank: offer.facts for offer in found})
        self._index = Index(
            [(group.name, group.rule) for group in spec.groups],
            self._chunk,
            [min(counts) for counts in zip(*(offer.slots for offer in found), strict=True)],
            ranks=len(found),
            tiers=[TierInfo(name, shared) for name, shared in found[0].tiers],
            policy=self._config.policy,
            lease_ttl=self._config.lease_s,
            load_deadline=self._config.load_timeout_s,
            probe_deadline=self._config.probe_timeout_s,
            patience=_PATIENCE_S,
            admit=self._admission,
        )
        if self.events is not None:
            self._index.on_change(self.events.notice)
        info("cache-ready", ranks=len(found), chunk_tokens=self._chunk, model=spec.model)

    # ---------------------------------------------------------------- a request's way

    def arrived(self, request: Request) -> None:
        """A new request: what it may need from lower tiers is fetched while it queues."""
        tracked = self._track(request)
        if tracked is not None and not request.skip_reading_prefix_cache:
            self._offer(tracked, 0, counted=False)

    def matched(self, request: Request, local: int) -> int | None:
        """Tokens beyond the first `local` that can be loaded; None: ask again."""
        tracked = self._track(request)
        if tracked is None or request.skip_reading_prefix_cache:
            return 0
        tracked.local = local
        return self._offer(tracked, local)

    def _offer(self, tracked: Tracked, local: int, *, counted: bool = True) -> int | None:
        index, now = self._index, time.monotonic()
        if index is None:
            return 0
        owner = tracked.request.request_id
        limit = tracked.request.num_tokens - 1
        if tracked.fetching:
            if index.awaited(tracked.fetching) and local < tracked.found:
                return None  # a tier that hangs is reported late after `load_timeout_s`
            tracked.fetching = 0
        if self._clearing:  # what is on the tiers is about to go
            tracked.stop = ABSENT
        elif not tracked.fetched:
            found = index.lookup(owner, self._named(tracked), limit, now)
            if found.status == "pending":
                return None
            tracked.sources, tracked.stop, tracked.found = found.by_tier, found.stop, found.tokens
            if found.tokens <= local:
                self._count(tracked, local, 0, counted)
                index.release(owner)
                return 0
            if set(found.by_tier) != {"dram"}:
                tracked.fetched = True
                job = index.begin_prefetch(owner, now, skip=local)
                if job is not None:
                    tracked.fetching = job
                    return None
        found = index.lookup(owner, self._named(tracked), limit, now, near=local)
        if found.tokens <= local:
            self._count(tracked, local, 0, counted)
            index.release(owner)
            return 0
        self._count(tracked, local, found.tokens - local, counted)
        return found.tokens - local

    def allocated(self, request: Request, blocks: tuple[list[int], ...], tokens: int) -> None:
        """vLLM has given the request blocks and counts on `tokens` of what was offered."""
        index = self._index
        tracked = self._requests.get(request.request_id)
        if index is None or tracked is None:
            return
        owner = request.request_id
        if tokens == 0:
            index.release(owner)
            return
        whole = tracked.local + tokens
        view = BlockView(owner, blocks, tracked.local, whole)
        job = index.begin_load(owner, time.monotonic(), tokens=whole, skip=tracked.local)
        if job is None:
            self._log.warning("load-refused", request=owner, reason="what was offered is gone")
            self._refused.append(view)
        else:
            self._views[job] = view

    def sources(self, request: Request, tokens: int) -> dict[str, int]:
        """By tier, where `tokens` loaded tokens came from: the last ones of the hit."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return {}
        return last_of(tracked.sources, tokens)

    def finished(self, request: Request) -> None:
        """The request is over."""
        tracked = self._requests.pop(request.request_id, None)
        self._tables.forget(request.request_id)
        if self._index is not None:
            self._index.forget(request.request_id)
        if tracked is not None:
            event(
                logging.DEBUG,
                "request",
                id=request.request_id,
                prompt=request.num_prompt_tokens,
                tokens=request.num_tokens,
                hit=dict(tracked.sources),
                stop=tracked.stop or "unasked",
                stored_chunks=tracked.stored,
            )

    # ---------------------------------------------------------------- a step

    def step(self, output: SchedulerOutput) -> StepMeta:
        """What the workers do in this step."""
        index = self._index
        if index is None:
            return StepMeta(plan=_NOTHING, refused=self._take_refused())
        now = time.monotonic()
        self._tables.update(output)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is not None:
                self._store(index, tracked, scheduled, output, now)
        self._ended(index.tick(now))
        if index.evictions != self._evictions:
            self.metrics.evicted("dram", index.evictions - self._evictions)
            self._evictions = index.evictions
        if index.refused != self._not_written:
            self.metrics.skipped_store("admission", index.refused - self._not_written)
            self._not_written = index.refused
        plan = index.take_plan()
        if plan.jobs:
            self._news = now
        views, self._views = self._views, {}
        idle = output.total_num_scheduled_tokens == 0
        quiet = idle and not self._requests
        return StepMeta(plan, views, self._take_refused(), tuple(self._clear_requests), idle, quiet)

    def _store(self, index: Index, tracked: Tracked, scheduled: int, output: SchedulerOutput, now: float) -> None:
        """Chunks whose last token is computed in this step, and whose token ids are all known."""
        request = tracked.request
        computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
        last = computed // self._chunk
        if last <= tracked.stored:
            return
        blocks = self._tables.of(request.request_id)
        if blocks is None:
            return
        first, tracked.stored = tracked.stored, last
        chain = self._named(tracked)
        resident = [
            resident_chunks(ids, size, self._chunk, last) for ids, size in zip(blocks, self._sizes, strict=True)
        ]
        store = index.begin_store(request.request_id, chain, first=first, last=last, now=now, resident=resident)
        for reason, count in store.skipped.items():
            self.metrics.skipped_store(reason, count)
        if store.job is not None:
            self.metrics.stored(store.accepted)
            self._views[store.job] = BlockView(request.request_id, blocks, 0, last * self._chunk)

    def reported(self, meta: RankMeta) -> None:
        """What the workers say."""
        index, now = self._index, time.monotonic()
        self._cleared.update(meta.cleared)
        done = min(self._cleared.get(rank, 0) for rank in range(self._ranks))
        self._clear_requests = [request for request in self._clear_requests if request.number > done]
        if index is None:
            return
        self._measured(meta.facts)
        if meta.reports:
            self._news = now
        for report in meta.reports:
            self._ended(index.report(report, now))

    def _measured(self, facts: Mapping[int, Sequence[TierFacts]]) -> None:
        if self._admission is not None:
            for rank, known in facts.items():
                self._admission.measured(rank, known)

    def _ended(self, jobs: Iterable[Finished]) -> None:
        for job in jobs:
            if job.kind == "load":
                if any(status != Status.OK for status in job.statuses):
                    self.metrics.failed("load", "lost")
                else:
                    self.metrics.loaded(job.ok_tokens)

    @property
    def busy(self) -> bool:
        """There is work that goes on only while the engine steps."""
        index = self._index
        if index is None:
            return False
        if time.monotonic() - self._news > _STALLED_S:
            return False
        return self._clearing or index.stats()["jobs"] > 0

    # ---------------------------------------------------------------- the rest

    def clear(self, salt: str | None = None) -> bool:
        """Forget everything (of one tenant), and have the workers empty their tiers; until they have, those are not asked."""
        index = self._index
        if index is None:
            return True
        namespaces = None
        if salt is not None:
            self._namespace(salt, "")
            namespaces = tuple(found for (owner, _), found in self._namespaces.items() if owner == salt)
        for namespace in (None,) if namespaces is None else namespaces:
            index.clear(namespace, time.monotonic())
        self._clears_asked += 1
        self._clear_requests.append(ClearRequest(self._clears_asked, namespaces))
        self._news = time.monotonic()
        for tracked in self._requests.values():
            tracked.stored = 0
        return True

    def reset(self) -> bool:
        """vLLM was told to forget, which it is whenever weights may have changed under it (pause, sleep, update).

        What is computed from here on gets names that no other process has: files say nothing about weights in memory.
        """
        self._version = uuid.uuid4().hex
        self._namespaces.clear()
        self._requests.clear()  # those that run are no longer stored: nobody knows which weights they began with
        return self.clear()

    @property
    def _clearing(self) -> bool:
        return bool(self._clear_requests)

    def stats(self) -> dict[str, float]:
        """The half's own metrics and the index's counts."""
        counts = self._index.stats() if self._index is not None else {}
        return self.metrics.snapshot() | {f"index_{name}": float(value) for name, value in counts.items()}

    def _track(self, request: Request) -> Tracked | None:
        if self._index is None:
            return None
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            try:
                namespace = self._namespace(names.salt_of(request), names.lora_of(request))
                tracked = Tracked(request, namespace, names.extras_of(request))
                self._named(tracked)
            except names.Unnamed as why:
                self.metrics.uncached(why.reason)
                self._log.warning("uncached", key=why.reason, request=request.request_id, reason=why)
                return None
            except TokenError as error:
                self.metrics.uncached("tokens")
                self._log.warning("uncached", key="tokens", request=request.request_id, reason=error)
                return None
            self._requests[request.request_id] = tracked
            if self._recorder is not None:
                self._recorder.record(request.num_tokens, tracked.chain.digests)
        return tracked

    def _named(self, tracked: Tracked) -> Chain:
        """Names of the request's full chunks, grown with its tokens."""
        request = tracked.request
        if len(tracked.chain.digests) < request.num_tokens // self._chunk:
            ids = as_tokens(list(request.all_token_ids))
            known = len(tracked.chain.digests)
            tracked.chain = chain_of(tracked.namespace, ids, self._chunk, tracked.extras)
            if self.events is not None:
                self.events.learn(request, tracked.chain, known)
        return tracked.chain

    def _namespace(self, salt: str, lora: str) -> bytes:
        found = self._namespaces.get((salt, lora))
        if found is None:
            assert self._spec is not None
            found = namespace_of(
                self._spec,
                chunk_tokens=self._chunk,
                salt=salt,
                lora=lora,
                weights_version=self._version,
                share=self._config.share,
            )
            if len(self._namespaces) >= _NAMESPACES_KEPT:  # a salt per request must not fill the memory
                self._namespaces.pop(next(iter(self._namespaces)))
            self._namespaces[salt, lora] = found
        return found

    def _take_refused(self) -> list[BlockView]:
        refused, self._refused = self._refused, []
        return refused

    def _count(self, tracked: Tracked, local: int, tokens: int, counted: bool) -> None:
        """Once a request: what it asked beyond vLLM's own hit, what it got, and why it ends there."""
        if tracked.counted or not counted:
            return
        tracked.counted = True
        asked = tracked.request.num_tokens - local
        self.metrics.requested(asked)
        for tier, found in last_of(tracked.sources, tokens).items():
            self.metrics.hit(tier, found)
        if asked > tokens:
            stop = tracked.stop
            reason = "group" if stop.startswith(GROUP) else _MISS_REASONS.get(stop, stop)
            self.metrics.missed("tail" if reason == "end" else reason, asked - tokens)


def last_of(by_tier: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Of a hit's tokens by tier, nearest first, the last `tokens`."""
    found: dict[str, int] = {}
    for tier, count in reversed(list(by_tier.items())):
        if tokens > 0:
            found[tier] = min(count, tokens)
            tokens -= found[tier]
    if tokens > 0:
        found["dram"] = found.get("dram", 0) + tokens
    return found


def resident_chunks(blocks: list[int], block_tokens: int, chunk_tokens: int, chunks: int) -> list[bool]:
    """Which of the first `chunks` chunks lie whole in blocks that are really there."""
    per = chunk_tokens // block_tokens
    return [(i + 1) * per <= len(blocks) and all(blocks[i * per : (i + 1) * per]) for i in range(chunks)]


def _nothing() -> Any:
    from lmcache.plan import Plan

    return Plan(0, (), ())


_NOTHING = _nothing()
