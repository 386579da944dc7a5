"""The connector's scheduler side: decides for one engine. Plans go to the workers with each step, reports come back.

It never blocks. A hit is offered to vLLM only when all of it is verified and in DRAM on every rank, so that its load cannot fail
on a tier: objects on lower tiers are prefetched first, and until then the answer to vLLM is to call again later. Only what
DRAM has no room for is loaded directly from its tier, and only if vLLM recomputes what fails to load. What a forward pass
computes is stored in the same step, before vLLM can reuse its blocks.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from lmcache.adapter import record_failure
from lmcache.config import Config
from lmcache.control.outcomes import Finished, StopReason
from lmcache.control.plane import Plane
from lmcache.errors import TokenError
from lmcache.keys import as_tokens
from lmcache.observe.log import Throttle, event, info
from lmcache.observe.metrics import Metrics
from lmcache.plan import Chain, Plan, Status
from lmcache_vllm import compat, names
from lmcache_vllm.events import Events
from lmcache_vllm.geometry import rounded_chunk
from lmcache_vllm.messages import BlockView, Offer, RankMeta, StepMeta, agreed
from lmcache_vllm.requests import Tracked, last_of, resident_chunks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_PATIENCE_S = 60.0
"""Seconds to wait for the result of a probe: workers report with the next step, and a step with a long prefill takes long."""

_OPENING_STEPS = 64
"""Steps in which requests wait for the workers' offers; workers answer the first one, two or more steps may be under way."""

_RETRIED = 64
"""Objects whose write-back failed that are tried again together."""

_RETRY_S = 5.0
"""Least seconds between two such attempts, unless the last one succeeded."""

_PREFETCHED = 16
"""Queued requests that are looked at in a step to prefetch for them."""

_FOREIGN = 65_536
"""Chunks loaded by other connectors that are remembered, at most."""

_STALLED_S = 30.0
"""Seconds without a plan or report after which pending work no longer keeps an idle engine stepping."""


class ConnectorScheduler:
    """See the module. Methods have the names of vLLM's connector interface.

    Args:
        kv_config: as vLLM passes it to a connector.
        config: settings.
        events: collect KV events.
        ranks: number of workers.
        loads, stores: what vLLM's `kv_role` allows.
        recomputes: vLLM recomputes what fails to load; otherwise it ends the request with an error.

    Attributes:
        disabled: why nothing is cached, or empty.
    """

    def __init__(
        self,
        kv_config: KVCacheConfig,
        config: Config,
        *,
        events: bool = False,
        ranks: int = 1,
        loads: bool = True,
        stores: bool = True,
        recomputes: bool = False,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._loads = loads
        self._stores = stores
        self._recomputes = recomputes
        self._opening = _OPENING_STEPS  # steps left in which offers may come; 0 once they have
        self._chunk = rounded_chunk(kv_config, config.chunk_tokens)
        self._sizes = [int(group.kv_cache_spec.block_size) for group in kv_config.kv_cache_groups]
        hashed = getattr(kv_config, "hash_block_size", None) or min(self._sizes)
        self.events = Events(self._chunk, hashed) if events else None
        self._log = Throttle()
        self.metrics = Metrics()
        self.disabled = "the workers have not reported what they hold"
        self._plane: Plane | None = None
        self._requests: dict[str, Tracked] = {}
        self.loras = names.Loras()
        self._queued: dict[str, Tracked] = {}  # not asked about by vLLM and not in DRAM yet, in order
        self._no_room = False  # in this step, a request that vLLM asked about
        self._foreign: dict[bytes, None] = {}  # digests of the first chunks that other connectors have loaded
        self._abandoned: set[str] = set()  # requests that run uncached after an exception
        self._tables = compat.BlockTables()
        self._views: dict[int, BlockView] = {}
        self._refused: list[BlockView] = []
        self._last_activity = 0.0
        self._retry_at = 0.0
        self._retried = self._written = 0  # objects of the last retry; objects that had been written before it

    # ---------------------------------------------------------------- start-up

    def open(self, offers: Iterable[Offer]) -> None:
        """Opens the index for what the workers have opened. If they disagree, the cache stays disabled."""
        self._opening = 0
        found = sorted(offers, key=lambda offer: offer.rank)
        self.disabled = agreed(found)
        if self.disabled:
            self._log.warning("cache-disabled", reason=self.disabled)
            return
        specs = [offer.spec for offer in found if offer.spec is not None]
        self._plane = plane = Plane(
            self._config,
            specs,
            [min(counts) for counts in zip(*(offer.slots for offer in found), strict=True)],
            found[0].tiers,
            self.metrics,
            chunk_tokens=self._chunk,
            patience=_PATIENCE_S,
        )
        plane.apply((), {offer.rank: offer.facts for offer in found}, time.monotonic())
        if self.events is not None:
            plane.on_change(self.events.notice)
        info(
            "cache-ready",
            ranks=len(found),
            chunk_tokens=self._chunk,
            loads=self._loads,
            stores=self._stores,
            model=specs[0].model,
        )

    # ---------------------------------------------------------------- requests

    def on_new_request(self, request: Request) -> None:
        """Prefetches from lower tiers while the request is queued."""
        tracked = self._track(request)
        if tracked is not None and self._reads(request) and self._begin_queued(tracked):
            self._queued[request.request_id] = tracked

    def get_num_new_matched_tokens(self, request: Request, local: int) -> int | None:
        """Returns how many tokens beyond the first `local` can be loaded; None: call again later."""
        if self._opening:
            return None
        tracked = self._track(request)
        if tracked is None or not self._reads(request):
            return 0
        self._queued.pop(request.request_id, None)
        tracked.asked = True
        tracked.local = local
        tracked.offered = self._offer(tracked, local)
        return tracked.offered

    def _reads(self, request: Request) -> bool:
        return self._loads and not request.skip_reading_prefix_cache and self.loras.is_loaded(request)

    def _offer(self, tracked: Tracked, local: int, *, asked: bool = True) -> int | None:
        """Returns how many tokens can be loaded; None while they are brought into DRAM, or wait for room there."""
        plane, now = self._plane, time.monotonic()
        if plane is None:
            return 0
        owner, limit = tracked.request.request_id, tracked.request.num_tokens - 1
        tracked.lacking = False
        if tracked.prefetch:
            if plane.awaited(tracked.prefetch) and local < tracked.found:
                return None  # ends after `load_timeout_s` at the latest: then the job is reported as late
            tracked.spent |= tracked.prefetch in plane.state.jobs.live  # late: a call still hangs
            tracked.prefetch = 0
        if asked and self._no_room and now < tracked.until:  # a request before this one waits for room, in this step
            return None
        chain = self._named(tracked)
        found = plane.lookup(owner, chain, limit, now)
        if found.status == "pending":
            return None
        tracked.found, tracked.stop = found.tokens, found.stop
        if not tracked.prefetched:
            tracked.sources = found.by_tier
        if set(found.by_tier) - {"dram"}:
            if not tracked.spent and self._prefetch(plane, tracked, local, asked, now):
                return None
            near = plane.lookup(owner, chain, limit, now, near=local)
            if near.tokens < found.tokens:
                if self._waits(plane, tracked, local, asked, now):
                    return None
                if asked and self._recomputes and not tracked.spent:
                    plane.lookup(owner, chain, limit, now)  # the rest is loaded from its tier, past DRAM
                else:
                    found = near
                    if near.stop is not StopReason.WRITING:
                        tracked.stop = StopReason.FAILED if tracked.spent else StopReason.NO_ROOM
        tokens = max(0, found.tokens - local)
        if not tokens:
            plane.release(owner)
        return tokens

    def _prefetch(self, plane: Plane, tracked: Tracked, local: int, asked: bool, now: float) -> bool:
        """Starts to bring the leased hit into DRAM, as far as there is room; returns whether any of it is on its way.

        A request that vLLM asks about takes the room of leases of those behind it.
        """
        owner = tracked.request.request_id
        job = plane.begin_prefetch(owner, now, skip=local)
        if job is None and asked:
            for other in self._behind(plane, tracked):
                plane.release(other)
                job = plane.begin_prefetch(owner, now, skip=local)
                if job is not None:
                    break
        if job is None:
            return False
        tracked.prefetch, tracked.prefetched = job, True
        return True

    def _behind(self, plane: Plane, tracked: Tracked) -> list[str]:
        """Returns owners of leases behind a request, last arrived first; not those that are loading, or were offered."""
        found, ahead = [], False
        for owner in reversed(self._requests):
            other = self._requests[owner]
            if other is tracked:
                ahead = True
            elif owner in plane.leases and not (
                other.offered or plane.awaited(other.prefetch) or (ahead and other.asked)
            ):
                found.append(owner)
        return found

    def _waits(self, plane: Plane, tracked: Tracked, local: int, asked: bool, now: float) -> bool:
        """Whether a request, some of which is only on a tier, waits for room in DRAM: not longer than a load may take."""
        if tracked.spent:
            return False
        if not asked:
            tracked.lacking = True
            return False
        room = min((pool.slots for pool in plane.state.pools if pool.chained), default=0)
        if tracked.found - local > room * self._chunk or not plane.state.jobs.live:
            return False  # more than DRAM, or nothing under way that could make room
        tracked.until = tracked.until or now + self._config.load_timeout_s
        self._no_room = now < tracked.until
        return self._no_room

    def _prefetch_queued(self) -> None:
        """Prefetches for queued requests for which that has not ended, in order, until there is no room."""
        for owner, tracked in list(islice(self._queued.items(), _PREFETCHED)):
            try:
                left = self._begin_queued(tracked)
            except Exception as error:
                self.abandon(owner, error)
                continue
            if not left:
                del self._queued[owner]
            elif tracked.lacking:
                break

    def _begin_queued(self, tracked: Tracked) -> bool:
        """Prefetches for a queued request, as far as there is room; returns whether there is something left to do."""
        return self._offer(tracked, 0, asked=False) is None or tracked.lacking

    def update_state_after_alloc(self, request: Request, blocks: tuple[list[int], ...], tokens: int) -> None:
        """Plans the load of `tokens` of the offered tokens into the blocks that vLLM has allocated for the request.

        0: vLLM has no use for the offer, or takes another connector's.
        """
        plane, tracked = self._plane, self._requests.get(request.request_id)
        if plane is None or tracked is None:
            return
        owner = request.request_id
        if tracked.offered is not None:  # not the second call, after a load has ended
            self._count(tracked, tokens)
            tracked.offered, tracked.expected = None, tracked.local + tokens
        if tokens == 0:
            plane.release(owner)
            return
        whole = tracked.local + tokens
        view = BlockView(owner, blocks, tracked.local, whole)
        job = plane.begin_load(owner, time.monotonic(), tokens=whole, skip=tracked.local)
        if job is None:
            self._log.warning("load-refused", request=owner, reason="the offered hit is gone")
            self._refused.append(view)
        else:
            self._views[job] = view

    def sources(self, request: Request, tokens: int) -> dict[str, int]:
        """Returns, by tier, where the last `tokens` tokens of the request's hit were found."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return {}
        return last_of(tracked.sources, tokens)

    def request_finished(self, request: Request) -> None:
        """Forgets the request."""
        self._abandoned.discard(request.request_id)
        tracked = self._requests.pop(request.request_id, None)
        self._queued.pop(request.request_id, None)
        self._tables.forget(request.request_id)
        if self._plane is not None:
            self._plane.forget(request.request_id)
        if tracked is not None:
            self._note_lora(tracked)
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

    # ---------------------------------------------------------------- steps

    def build_connector_meta(self, output: SchedulerOutput) -> StepMeta:
        """Returns what the workers do in this step."""
        plane = self._plane
        if plane is None:
            return StepMeta(plan=Plan(0, (), ()), refused=self._take_refused(), opening=self._still_opening())
        now = time.monotonic()
        self._tables.update(output)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is not None:
                try:
                    self._store(plane, tracked, scheduled, now)
                except Exception as error:
                    self.abandon(request_id, error)
        self._no_room = False
        self._prefetch_queued()
        if self._retry_is_due(plane, now):
            self._written = plane.state.counts["written"]
            self._retried = plane.state.retry_oldest(_RETRIED)
            self._retry_at = now + _RETRY_S
        finished, plan = plane.advance((), {}, now)
        self._ended(finished)
        if plan.jobs:
            self._last_activity = now
        views, self._views = self._views, {}
        idle = output.total_num_scheduled_tokens == 0
        quiet = idle and not self._requests
        return StepMeta(plan, views, self._take_refused(), idle, quiet)

    def _still_opening(self) -> bool:
        """Whether workers should send their offers; after `_OPENING_STEPS` steps without them nothing is cached."""
        if self._opening:
            self._opening -= 1
            if not self._opening:
                self.disabled = f"the workers did not say within {_OPENING_STEPS} steps what they hold"
                self._log.warning("cache-disabled", reason=self.disabled)
        return self._opening > 0

    def _store(self, plane: Plane, tracked: Tracked, scheduled: int, now: float) -> None:
        """Plans to store the chunks whose last token is computed in this step, if all their token ids are known."""
        if not self._stores:
            return
        request = tracked.request
        if tracked.expected is not None:
            tracked.computed = request.num_computed_tokens
            if tracked.computed - tracked.expected >= max(self._sizes):
                tracked.foreign = tracked.expected // self._chunk
            tracked.expected = None
        computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
        last = computed // self._chunk
        if last <= tracked.stored:
            return
        blocks = self._tables.of(request.request_id)
        if blocks is None or (tracked.lora and not self._is_named(tracked)):
            return  # a later step stores these chunks, if the request still has their blocks
        first, tracked.stored = tracked.stored, last
        last = self._own(tracked, first, last)
        if last <= first:
            return
        resident = [
            resident_chunks(ids, size, self._chunk, last) for ids, size in zip(blocks, self._sizes, strict=True)
        ]
        store = plane.begin_store(
            request.request_id, self._named(tracked), first=first, last=last, now=now, resident=resident
        )
        if store.job is not None:
            self._views[store.job] = BlockView(request.request_id, blocks, 0, last * self._chunk)

    def _own(self, tracked: Tracked, first: int, last: int) -> int:
        """Returns up to which of the chunks [first, last) the KV is this engine's own.

        Not so: what another connector has loaded, which may be rounded otherwise than the names say, and what depends on it.
        """
        if tracked.foreign is None and not self._foreign:
            return last
        digests = self._named(tracked).digests
        if tracked.foreign is not None and tracked.foreign < last:
            last = tracked.foreign
            self._foreign[digests[last]] = None
            while len(self._foreign) > _FOREIGN:
                del self._foreign[next(iter(self._foreign))]
        for i in range(first, last):
            if digests[i] in self._foreign:
                if i * self._chunk < tracked.computed:
                    tracked.foreign = i
                    return i
                del self._foreign[digests[i]]  # this time it was computed here
        return last

    def _is_named(self, tracked: Tracked) -> bool:
        """Whether the request's LoRA is loaded, and still the one that the request was named after."""
        self._note_lora(tracked)
        try:
            return self.loras.name_of(tracked.request) == tracked.lora and self.loras.is_loaded(tracked.request)
        except names.Unnamed:
            return False

    def _note_lora(self, tracked: Tracked) -> None:
        """Takes note that a LoRA is loaded, once a token computed with it has returned."""
        if tracked.lora and tracked.request.num_output_tokens:
            self.loras.used(tracked.request)

    def update_connector_output(self, meta: RankMeta) -> None:
        """Applies the workers' reports."""
        if self._opening and len(meta.offers) == self._ranks:
            self.open(offer.read() for offer in meta.offers)
        if self._plane is None:
            return
        now = time.monotonic()
        if meta.reports:
            self._last_activity = now
        self._ended(self._plane.apply(meta.reports, meta.facts, now))
        for namespace in dict.fromkeys(meta.cleared):
            self._plane.cleared_elsewhere(namespace)

    def _ended(self, jobs: Iterable[Finished]) -> None:
        for job in jobs:
            if job.kind == "load":
                if any(status != Status.OK for status in job.statuses):
                    self.metrics.failed("load", "lost")
                else:
                    self.metrics.loaded(job.ok_tokens)
            elif job.kind == "prefetch" and any(status != Status.OK for status in job.statuses):
                tracked = self._requests.get(str(job.owner))
                if tracked is not None:
                    tracked.spent = True

    @property
    def has_pending_push_work(self) -> bool:
        """Whether there is work that continues only while the engine steps."""
        if self._plane is None or time.monotonic() - self._last_activity > _STALLED_S:
            return False
        return bool(self._plane.state.jobs.live) or self._retry_is_due(self._plane, time.monotonic())

    def _retry_is_due(self, plane: Plane, now: float) -> bool:
        """Whether to try failed write-backs again: when nothing else is under way, or a tier takes objects (again)."""
        state = plane.state
        if not state.unwritten:
            return False
        written = state.counts["written"] - self._written
        if now < self._retry_at:
            return 0 < self._retried <= written
        return written > 0 or not state.jobs.live

    # ---------------------------------------------------------------- failures

    def abandon(self, request_id: str, error: Exception) -> None:
        """Runs a request uncached from now on, after an exception in its handling."""
        record_failure(error, "request-uncached", self._log, self.metrics, request=request_id)
        self.metrics.uncached("failed")
        self._abandoned.add(request_id)
        self._requests.pop(request_id, None)
        self._queued.pop(request_id, None)
        if self._plane is not None:
            self._plane.forget(request_id)

    def recover(self) -> None:
        """Starts anew after an exception in the handling of a step: DRAM is empty, tiers keep what they have.

        The next plan has a new epoch, with which the workers end all jobs, and report loads under way as failed.
        """
        if self._plane is None:
            return
        self._plane.reset(time.monotonic())
        self._views = {}
        self._queued.clear()
        for tracked in self._requests.values():
            tracked.prefetch = tracked.stored = 0

    # ---------------------------------------------------------------- reset, stats

    def reset_cache(self) -> bool:
        """Empties DRAM and renames what is computed from now on. vLLM calls this whenever weights may have changed.

        The new names are unique to this process: the identity of the weight files no longer describes the weights in memory.
        Nothing is removed from tiers: objects there are right for the weights that they name, and so is what is being written,
        because a store copies from vLLM's blocks in the step that has computed them.
        """
        if self._plane is not None:
            self._plane.names.set_weights_version(uuid.uuid4().hex)
            self._plane.drop_all()
        self._queued.clear()
        self._requests.clear()  # running requests are no longer stored: part of their KV has the old weights
        return True

    def stats(self) -> dict[str, float]:
        """Returns the metrics, and the index's counts as `index_*`."""
        counts = self._plane.stats() if self._plane is not None else {}
        return self.metrics.snapshot() | {f"index_{name}": float(value) for name, value in counts.items()}

    def _track(self, request: Request) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is not None or self._plane is None or request.request_id in self._abandoned:
            return tracked
        try:
            found = Tracked(request, names.salt_of(request), self.loras.name_of(request), names.extras_of(request))
            chain = self._named(found)
        except names.Unnamed as unnamed:
            self.metrics.uncached(unnamed.reason)
            self._log.warning("uncached", key=unnamed.reason, request=request.request_id, reason=unnamed)
            return None
        except TokenError as error:
            self.metrics.uncached("tokens")
            self._log.warning("uncached", key="tokens", request=request.request_id, reason=error)
            return None
        self._requests[request.request_id] = found
        self._plane.record(request.num_tokens, chain)
        return found

    def _named(self, tracked: Tracked) -> Chain:
        """Returns the names of the request's full chunks; extends them as the request grows."""
        request, chain = tracked.request, tracked.chain
        known = len(chain.digests) if chain is not None else 0
        if chain is None or known < request.num_tokens // self._chunk:
            assert self._plane is not None
            ids = as_tokens(list(request.all_token_ids))
            tracked.chain = chain = self._plane.names.chain(ids, tracked.salt, tracked.lora, tracked.extras)
            if self.events is not None:
                self.events.learn(request, chain, known)
        return chain

    def _take_refused(self) -> list[BlockView]:
        refused, self._refused = self._refused, []
        return refused

    def _count(self, tracked: Tracked, tokens: int) -> None:
        """Counts a request once: tokens requested beyond vLLM's own hit, tokens to load, and why the hit ends.

        Not counted: an offer that vLLM does not take.
        """
        if tracked.counted or self._plane is None or not self._reads(tracked.request):
            return
        tracked.counted = True
        if tracked.offered and not tokens:
            return
        self._plane.count_request(
            tracked.request.num_tokens,
            tracked.local + tokens,
            last_of(tracked.sources, tokens),
            tracked.stop or StopReason.ABSENT,
            local=tracked.local,
        )
