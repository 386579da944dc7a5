"""A vLLM session for the conformance suite: one engine in this process, a connector that is observed, and recomputation.

Recomputation runs on the same engine with the connector bypassed: after emptying vLLM's own prefix cache, it repeats the forward
passes that computed a prompt's KV, each starting at the same token as before.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.executor import multiproc_executor

from lmcache.tiers.disk import DiskTier
from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.labs.splits import Pass, Splits, Start, refill
from lmcache_vllm.connector import LMCacheConnector

_TOP = 20
"""Log-probs compared per token, beside that of the sampled token."""

_BLOCK = 32
_TOKENS = 16_384
_DRAIN_S = 60.0


@dataclass
class Observed:
    """Sources of one request's KV: tokens from vLLM's own cache, from ours, and the latter by tier."""

    local: int = 0
    external: int = 0
    by_tier: Mapping[str, int] = field(default_factory=dict)


class ObservedConnector(LMCacheConnector):
    """Records what is loaded. While `bypassed`, the cache is neither read nor written."""

    bypassed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, Observed] = {}
        self._local: dict[str, int] = {}

    @property
    def connector_scheduler(self) -> Any:
        """The `ConnectorScheduler`; None in a worker process, and if the cache is off."""
        return self._scheduler

    @property
    def connector_worker(self) -> Any:
        """The `ConnectorWorker` or its replacement; None in the scheduler's process."""
        return self._worker

    def on_new_request(self, request: Any) -> None:
        """Prefetches, unless bypassed."""
        if not self.bypassed:
            super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Looks up, unless bypassed. Records vLLM's own hit, except when a preempted request resumes."""
        if not request.num_preemptions:
            self._local[request.request_id] = num_computed_tokens
        return (0, False) if self.bypassed else super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans the load, unless bypassed, and records its sources."""
        if self.bypassed:
            self.seen.setdefault(request.request_id, Observed(self._local.get(request.request_id, 0)))
            return
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        owner = request.request_id
        if not request.num_preemptions and (owner not in self.seen or num_external_tokens):
            tiers = self._scheduler.sources(request, num_external_tokens) if self._scheduler else {}
            self.seen[owner] = Observed(self._local.get(owner, 0), num_external_tokens, tiers)


class VLLMSession:
    """One engine. Broken adapters replace `connector`."""

    connector = "lmcache_vllm.testing.session:ObservedConnector"

    def __init__(self, config: SessionConfig) -> None:
        options = config.options
        block = int(options.get("block_tokens", _BLOCK))
        room = int(options.get("device_tokens", _TOKENS))
        step = int(options.get("prefill_tokens", 0))
        module, _, name = str(options.get("connector", self.connector)).partition(":")
        ranks = int(options.get("tensor_parallel", 1))
        if ranks > 1:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
            if "lmcache_vllm.testing.preload" in sys.modules:
                _fork_ranks()
        more: dict[str, Any] = {}
        if step:
            more = {
                "max_num_batched_tokens": max(step, 1),
                "enable_chunked_prefill": True,
                "max_num_seqs": min(16, step),
            }
        else:
            more = {"max_num_batched_tokens": 8192}
        # Keeps all blocks of sliding windows: recomputation may start inside a pass. Older releases always keep all.
        interval = "prefix_cache_retention_interval"
        dense: dict[str, Any] = {interval: None} if interval in EngineArgs.__dataclass_fields__ else {}
        self._llm = LLM(
            model=config.model,
            dtype=cast(Any, config.dtype),
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=min(4096, room * 3 // 4),
            block_size=block,
            num_gpu_blocks_override=room // block * _groups(config.model) + 1,
            max_logprobs=_TOP,
            seed=0,
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector=name,
                kv_connector_module_path=module,
                kv_role="kv_both",
                kv_load_failure_policy=options.get("kv_load_failure_policy", "recompute"),
                kv_connector_extra_config=dict(config.cache),
            ),
            tensor_parallel_size=ranks,
            **dense,
            **{**more, **dict(options.get("engine", {}))},
        )
        self._engine: Any = self._llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._connector: ObservedConnector = self._core.scheduler.connector
        self._splits = Splits(int(config.cache.get("chunk_tokens", block)))
        self._chunk = int(config.cache.get("chunk_tokens", block))
        self._disk = str(config.cache.get("disk_path", ""))
        self._one_shot = False
        self._cap: int | None = None
        self._number = 0
        self._cap_own_hits()

    def _cap_own_hits(self) -> None:
        """Limits hits of vLLM's own prefix cache during recomputation to the length that the original pass had."""
        coordinator = self._core.scheduler.kv_cache_manager.coordinator
        plain = coordinator.find_longest_cache_hit

        def capped(hashes: Any, longest: int, *more: Any, **named: Any) -> Any:
            return plain(hashes, longest if self._cap is None else min(longest, self._cap), *more, **named)

        coordinator.find_longest_cache_hit = capped

    # ---------------------------------------------------------------- the session's interface

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        """Runs all requests at once; with `reuse=False`, recomputes one after another."""
        if not reuse:
            return [self._recompute(request) for request in requests]
        answers = self._run(requests)
        for request, (answer, seen) in zip(requests, answers, strict=True):
            self._learn(request, answer, seen)
        return [answer for answer, _ in answers]

    def forget_splits(self) -> None:
        """Recomputes in a single pass from now on."""
        self._one_shot = True

    def drop_device_cache(self) -> None:
        """Empties vLLM's own prefix cache."""
        self._step_until_idle()
        assert self._engine.reset_prefix_cache(), "vLLM refuses to reset its prefix cache"

    def flush(self) -> None:
        """Steps until nothing is left to be written."""
        self._step_until_idle()
        if self._connector_worker is not None:
            self._connector_worker.flush()

    def clear(self, salt: str | None = None) -> None:
        """Empties our cache as an operator does: vLLM resets its caches, and the folder is cleared, see `lmcache clear`."""
        assert salt is None, "vLLM has no call that clears one tenant"
        self._step_until_idle()
        assert self._engine.reset_prefix_cache(reset_connector=True), "vLLM refuses to reset its caches"
        if self._disk:
            tier = DiskTier(self._disk)
            tier.clear()
            tier.close()
        self._splits.forget(None)

    def stats(self) -> Mapping[str, float]:
        """Returns the sums of the scheduler's and the worker's metrics, and the index's counts."""
        found: dict[str, float] = {}
        for side in (self._connector.connector_scheduler, self._connector_worker):
            numbers = {} if side is None else (side.stats() if hasattr(side, "stats") else side.metrics.snapshot())
            for name, value in numbers.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def close(self) -> None:
        """Finishes write-back and ends the engine, without garbage collection: its process ends right after."""
        self._step_until_idle()
        with mock.patch("gc.unfreeze"), mock.patch("gc.collect"):
            self._core.shutdown()

    # ---------------------------------------------------------------- running

    @property
    def _connector_worker(self) -> Any:
        """The connector's worker, if it is in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        return get_kv_transfer_group().connector_worker if has_kv_transfer_group() else None

    def _step_until_idle(self) -> None:
        until = time.monotonic() + _DRAIN_S
        while self._core.scheduler.has_requests():
            self._core.step()
            assert time.monotonic() < until, "the engine has no requests left but still has work"

    def _run(self, requests: Sequence[Request], *, ignore_end: bool = True) -> list[tuple[Response, Observed]]:
        ids = []
        for request in requests:
            self._number += 1
            prompt: dict[str, Any] = {"prompt_token_ids": list(request.tokens)}
            if request.salt:
                prompt["cache_salt"] = request.salt
            params = SamplingParams(
                max_tokens=request.max_new_tokens,
                temperature=0.0,
                logprobs=_TOP,
                ignore_eos=ignore_end,
                detokenize=False,
            )
            ids.append(str(self._number))
            self._engine.add_request(ids[-1], prompt, params)
        outputs: dict[str, Any] = {}
        wanted = dict(zip(ids, requests, strict=True))
        cancelled: set[str] = set()
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                outputs[output.request_id] = output
                after = wanted[output.request_id].cancel_after
                if after and not output.finished and len(output.outputs[0].token_ids) >= after:
                    self._engine.abort_request([output.request_id])
                    cancelled.add(output.request_id)
        return [self._answer(i, outputs.get(i), i in cancelled) for i in ids]

    def _answer(self, request_id: str, output: Any, cancelled: bool) -> tuple[Response, Observed]:
        inner = next((i for i in self._connector.seen if i == request_id or i.startswith(f"{request_id}-")), "")
        seen = self._connector.seen.pop(inner, Observed())
        self._connector._local.pop(inner, None)
        if output is None:
            return Response(error="cancelled" if cancelled else "no answer"), seen
        done = output.outputs[0]
        if done.finish_reason not in ("length", "stop") and not cancelled:
            return Response(tokens=tuple(done.token_ids), error=f"finished with {done.finish_reason!r}"), seen
        cached = {"device": seen.local} if seen.local else {}
        return (
            Response(
                tokens=tuple(done.token_ids),
                logprobs=tuple(_bits(row) for row in done.logprobs or ()),
                logprob=tuple(row[t].logprob for row, t in zip(done.logprobs or (), done.token_ids, strict=False)),
                cached={**cached, **seen.by_tier},
                error="cancelled" if cancelled else "",
            ),
            seen,
        )

    # ---------------------------------------------------------------- recomputation with the same split

    def _learn(self, request: Request, answer: Response, seen: Observed) -> None:
        owner, columns = (request.salt, ""), seen.local + seen.external
        start = self._splits.began(owner, request.tokens, columns)
        tokens = request.tokens + answer.tokens[:-1]  # the last token has no KV yet
        done = Pass(tokens, len(request.tokens), start)
        first, last = columns, len(tokens) // self._chunk * self._chunk
        with self._splits.lock:
            held = self._splits.start_of(owner, (*request.tokens, 0))
            if held.columns == len(
                request.tokens
            ):  # its last chunk was cached, and recomputed only because of its last token
                self._splits.wrote(owner, done, first, held.columns - self._chunk)
                first = held.columns
            self._splits.wrote(owner, done, first, last)

    def _recompute(self, request: Request) -> Response:
        self._step_until_idle()
        self._connector.bypassed = True
        try:
            self._engine.reset_prefix_cache()
            start = Start() if self._one_shot else self._splits.start_of((request.salt, ""), request.tokens)
            refill(start, request.tokens, request.salt, self._pass)
            return self._pass(request, start.columns)
        finally:
            self._connector.bypassed = False
            self._cap = None
            self._engine.reset_prefix_cache()

    def _pass(self, request: Request, columns: int) -> Response:
        self._cap = columns
        [(answer, seen)] = self._run([request])
        if answer.error:
            return answer
        if seen.local != columns:
            return Response(error=f"played back from token {seen.local}, the pass began at {columns}")
        return Response(tokens=answer.tokens, logprobs=answer.logprobs, logprob=answer.logprob)


def _fork_ranks() -> None:
    """Forks ranks on a CPU, where vLLM would spawn them, so that they inherit all imported modules."""
    if current_platform.is_cpu():
        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def _groups(model: str) -> int:
    """Returns approximately how many of vLLM's groups share the blocks."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return len(set(config.get("layer_types") or ("full_attention",)))


def _bits(row: Mapping[int, Any]) -> bytes:
    """Returns token ids and log-probs as bytes, in vLLM's order."""
    return b"".join(struct.pack("<Id", token, found.logprob) for token, found in row.items())
