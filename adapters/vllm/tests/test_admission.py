"""Admission to a disk in the connector's scheduler, by the fill levels that workers report. Without an engine."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from lmcache.config import Config
from lmcache.control.outcomes import TierInfo
from lmcache.plan import Copy, JobReport, Report, Status, Tier, TierFacts
from lmcache.spec import KVSpec
from lmcache.tiers.janitor import LOW
from lmcache_vllm.messages import Handshake, Offer, RankMeta
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
    """Two ranks that execute all jobs immediately, and a disk that keeps everything but reports a limited fill level."""

    def __init__(self, admission: str, used: int = 0) -> None:
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["model.layers.0.self_attn"], spec)]
        kv_config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups)
        self.scheduler = ConnectorScheduler(kv_config, Config(chunk_tokens=CHUNK, admission=admission))
        self.used = used
        self.written: list[bytes] = []
        self._seq = 0
        offers = [
            Offer(
                rank,
                WHOLE.shard(tp_rank=rank, tp_size=RANKS),
                (2 * CHUNKS,),
                (TierInfo("disk", True, int(LOW * CAPACITY)),),
                (self.facts(),),
            )
            for rank in range(RANKS)
        ]
        self.scheduler.open(Handshake.of(offer).read() for offer in offers)
        assert self.scheduler.disabled == ""

    def facts(self) -> TierFacts:
        return TierFacts(min(self.used, ROOM * OBJECT), 0, 0.0)

    def serve(self, number: int) -> None:
        """Runs one request: lookup, computation, store, end."""
        tokens = list(range(1000 * number, 1000 * number + CHUNKS * CHUNK))
        request: Any = Plain(
            request_id=f"{number}",
            cache_salt=None,
            lora_request=None,
            mm_features=[],
            prompt_embeds=None,
            skip_reading_prefix_cache=False,
            num_tokens=len(tokens),
            num_prompt_tokens=len(tokens),
            num_computed_tokens=0,
            all_token_ids=tokens,
        )
        while self.scheduler.get_num_new_matched_tokens(request, 0) is None:
            self.step({})
        blocks = ([1 + i for i in range(CHUNKS * CHUNK // BLOCK)],)
        self.scheduler.update_state_after_alloc(request, blocks, 0)
        self.step({request.request_id: len(tokens)}, [Plain(req_id=request.request_id, block_ids=blocks)])
        self.scheduler.request_finished(request)
        self.step({})
        self.step({})

    def step(self, scheduled: dict[str, int], new: Any = ()) -> None:
        nothing = Plain(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        meta = self.scheduler.build_connector_meta(
            Plain(
                total_num_scheduled_tokens=sum(scheduled.values()),
                num_scheduled_tokens=scheduled,
                scheduled_new_reqs=new,
                scheduled_cached_reqs=nothing,
            )  # type: ignore[arg-type]
        )
        self._seq += 1
        jobs = []
        for job in meta.plan.jobs:
            status = Status.MISSING if job.kind == "probe" else Status.OK
            jobs.append(JobReport(job.id, (int(status),) * len(job.ops), True))
            for op in job.ops:
                if isinstance(op, Copy) and isinstance(op.dst, Tier):
                    self.written.append(op.name.chain)
                    self.used += OBJECT
        output = None
        for rank in range(RANKS):
            of_rank = RankMeta([Report(meta.plan.epoch, rank, self._seq, tuple(jobs))], {rank: [self.facts()]})
            output = of_rank if output is None else output.aggregate(of_rank)
        assert output is not None
        assert set(output.facts) == set(range(RANKS))
        self.scheduler.update_connector_output(output)


def test_everything_is_written_while_the_disk_has_room_and_then_what_is_stored_again() -> None:
    workers = Workers("second")
    for number in range(30):
        workers.serve(number)
    assert len(workers.written) == ROOM
    stats = workers.scheduler.stats()
    assert stats["index_refused"] == stats['lmcache_skipped_stores_total{reason="admission"}'] == 30 * CHUNKS - ROOM
    workers.serve(29 - 5)  # evicted from DRAM, never written
    assert len(workers.written) == ROOM + CHUNKS


def test_a_disk_that_is_full_at_start_is_known_to_be() -> None:
    workers = Workers("second", used=CAPACITY)
    for number in range(5):
        workers.serve(number)
    assert workers.written == []


def test_room_that_workers_report_is_used() -> None:
    workers = Workers("second", used=CAPACITY)
    workers.serve(0)
    assert workers.written == []
    workers.used = 0  # the folder was emptied
    workers.step({})
    workers.serve(1)
    assert len(workers.written) == CHUNKS


def test_where_all_is_written_nobody_asks_about_room() -> None:
    workers = Workers("all", used=CAPACITY)
    for number in range(20):
        workers.serve(number)
    assert len(workers.written) == 20 * CHUNKS


def test_what_never_comes_again_soon_stays_off_a_full_disk() -> None:
    workers = Workers("adaptive")
    for number in range(60):
        workers.serve(number)
    assert ROOM < len(workers.written) <= 2 * ROOM, "until the rule has enough observations"
    assert len(workers.written) < 60 * CHUNKS / 2


def test_workers_that_say_nothing_about_their_tiers_are_believed_to_have_room() -> None:
    workers = Workers("second", used=CAPACITY)
    spec = KVSpec.uniform("m", layers=3, kv_heads=2, head_dim=32, dtype="float32")
    workers.scheduler.open([Offer(0, spec, (8,), (TierInfo("disk", True),))])
    assert workers.scheduler._plane is not None
    assert workers.scheduler._plane.admission.has_room(0)
