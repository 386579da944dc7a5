"""A connector's scheduler with workers that execute its jobs immediately. Without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from lmcache.config import Config
from lmcache.control.outcomes import TierInfo
from lmcache.plan import Copy, Engine, Job, JobReport, Report, Status, Tier, TierFacts
from lmcache.spec import KVSpec
from lmcache.tiers.janitor import LOW
from lmcache_vllm.messages import Handshake, Offer, RankMeta, StepMeta
from lmcache_vllm.scheduler import ConnectorScheduler

Plain = SimpleNamespace
CHUNK, BLOCK, CHUNKS = 64, 32, 4
RANKS = 2
WHOLE = KVSpec.uniform("m", layers=3, kv_heads=2, head_dim=32, dtype="float32")
OBJECT = WHOLE.object_bytes(0, CHUNK) + 4096
"""Bytes of a chunk on disk, both ranks together."""
ROOM = 40
"""Chunks that fit on the disk before its janitor evicts."""
CAPACITY = ROOM * OBJECT * 10 // 9 + 1000


class Workers:
    """Two ranks that execute all jobs immediately, and a disk that keeps everything but reports a limited fill level.

    Args:
        admission: see `Config`.
        used: bytes on the disk at the start.
        slots: chunks that fit into DRAM.
        opened: whether the scheduler has what the workers offer.
        settings: further settings.
        named: further arguments of the scheduler.

    Attributes:
        disk: digests on the disk.
        jobs: all jobs so far, but for `held`.
        held: jobs that are not executed, of the kinds in `hold`.
        status: what copies to and from the disk end with.
    """

    def __init__(
        self,
        admission: str = "all",
        used: int = 0,
        slots: int = 2 * CHUNKS,
        opened: bool = True,
        settings: Any = (),
        **named: Any,
    ) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["model.layers.0.self_attn"], spec)]
        kv_config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups)
        self.scheduler = ConnectorScheduler(
            kv_config, Config(chunk_tokens=CHUNK, admission=admission, **dict(settings)), ranks=RANKS, **named
        )
        self.used = used
        self.written: list[bytes] = []
        self.disk: set[bytes] = set()
        self.jobs: list[Job] = []
        self.hold: set[str] = set()
        self.held: list[Job] = []
        self.status = Status.OK
        self._seq = 0
        self.offers = [
            Offer(
                rank,
                WHOLE.shard(tp_rank=rank, tp_size=RANKS),
                (slots,),
                (TierInfo("disk", True, int(LOW * CAPACITY)),),
                (self.facts(),),
            )
            for rank in range(RANKS)
        ]
        if opened:
            self.scheduler.open(Handshake.of(offer).read() for offer in self.offers)
            assert self.scheduler.disabled == ""

    def facts(self) -> TierFacts:
        """Returns what ranks report about the disk."""
        return TierFacts(min(self.used, ROOM * OBJECT), 0, 0.0)

    def request(self, number: int, tokens: int = CHUNKS * CHUNK) -> Any:
        """Returns a request whose prompt is its own."""
        ids = list(range(1000 * number, 1000 * number + tokens))
        return Plain(
            request_id=f"{number}",
            cache_salt=None,
            lora_request=None,
            mm_features=[],
            prompt_embeds=None,
            skip_reading_prefix_cache=False,
            num_tokens=tokens,
            num_prompt_tokens=tokens,
            num_computed_tokens=0,
            all_token_ids=ids,
        )

    def serve(self, number: int) -> int:
        """Runs one request: lookup, load, computation, store, end. Returns how many tokens were loaded."""
        request = self.request(number)
        found = self.ask(request)
        blocks = self.allocate(request, found)
        self.compute(request, blocks, request.num_tokens - found)
        self.scheduler.request_finished(request)
        self.step({})
        self.step({})
        return found

    def ask(self, request: Any, local: int = 0, steps: int = 100) -> int:
        """Asks in every step what can be loaded, until there is an answer."""
        for _ in range(steps):
            found = self.scheduler.get_num_new_matched_tokens(request, local)
            if found is not None:
                return found
            self.step({})
        raise AssertionError(f"no answer in {steps} steps")

    def allocate(self, request: Any, tokens: int) -> Any:
        """Allocates blocks and loads `tokens`; returns the blocks."""
        blocks = ([1 + i for i in range(CHUNKS * CHUNK // BLOCK)],)
        self.scheduler.update_state_after_alloc(request, blocks, tokens)
        if tokens:
            self.step({})
            request.num_computed_tokens = tokens
        return blocks

    def compute(self, request: Any, blocks: Any, tokens: int) -> None:
        """Computes `tokens` tokens in one step."""
        self.step({request.request_id: tokens}, [Plain(req_id=request.request_id, block_ids=blocks)])
        request.num_computed_tokens += tokens

    def step(self, scheduled: dict[str, int], new: Sequence[Any] = ()) -> StepMeta:
        """Runs a step."""
        nothing: Any = Plain(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        output: Any = Plain(
            total_num_scheduled_tokens=sum(scheduled.values()),
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=nothing,
        )
        meta = self.scheduler.build_connector_meta(output)
        self.report(meta.plan.epoch, meta.plan.jobs, opening=meta.opening)
        return meta

    def report(self, epoch: int, jobs: Sequence[Job], *, opening: bool = False) -> None:
        """Executes jobs on all ranks, and has their reports applied."""
        self.held += [job for job in jobs if job.kind in self.hold]
        done = [job for job in jobs if job.kind not in self.hold]
        self._seq += 1
        self.jobs += done
        reports = tuple(JobReport(job.id, tuple(int(self._execute(op)) for op in job.ops), True) for job in done)
        output = None
        for rank in range(RANKS):
            offers = [Handshake.of(offer) for offer in self.offers if offer.rank == rank and opening]
            of_rank = RankMeta([Report(epoch, rank, self._seq, reports)], {rank: [self.facts()]}, offers)
            output = of_rank if output is None else output.aggregate(of_rank)
        assert output is not None
        assert set(output.facts) == set(range(RANKS))
        self.scheduler.update_connector_output(output)

    def _execute(self, op: Any) -> Status:
        if not isinstance(op, Copy):
            return Status.OK if op.name.chain in self.disk else Status.MISSING
        if isinstance(op.src, Tier):
            return self.status if op.name.chain in self.disk else Status.MISSING
        if isinstance(op.dst, Tier) and self.status is Status.OK:
            self.written.append(op.name.chain)
            self.disk.add(op.name.chain)
            self.used += OBJECT
        return self.status if isinstance(op.dst, Tier) else Status.OK

    def kinds(self) -> list[str]:
        """Returns the kinds of all jobs so far, and forgets them."""
        kinds, self.jobs = [job.kind for job in self.jobs], []
        return kinds


def into_engine(job: Job) -> int:
    """Returns how many objects a job copies into the engine."""
    return sum(isinstance(op, Copy) and isinstance(op.dst, Engine) for op in job.ops)
