"""Levels `pressure`, `concurrency`, `chunked_prefill`, `preemption`: many requests, little memory, correct responses."""

from __future__ import annotations

import math

from lmcache_conformance.contract import Level, Request, Response
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, Engine, on, same_tokens, varied
from lmcache_conformance.runner.marks import level, requires

AT_ONCE = 16


class TrafficTests(EngineBase):
    """Behaviour under load."""

    # ---------------------------------------------------------------- pressure

    @level(Level.PRESSURE)
    @on("llama", "gemma3", exact_only=True)
    def test_little_room_costs_hits_and_nothing_else(self, bench: Bench, full: bool) -> None:
        """Conversations alternate in tiers that are too small for them, so that nearly every store evicts something."""
        with bench.open(
            dram_bytes=1, queue_bytes="1MiB", disk_path=str(bench.new_folder()), disk_bytes="1MiB"
        ) as engine:
            responses = []
            prompts = [bench.chunks(3 + n) for n in range(4)]
            for turn in range(6 if full else 3):
                for number, prompt in enumerate(prompts):
                    response = engine.ask(prompt, max_new_tokens=12)
                    what = f"turn {turn + 1} of conversation {number + 1}"
                    same_tokens(response, bench.cold().recompute(prompt, max_new_tokens=12), what)
                    responses.append(response)
                    prompts[number] = prompt + response.tokens + bench.prompt(bench.chunk_tokens)
            varied(responses)
            short = bench.chunks(3)
            engine.ask(short)
            engine.drop_device_cache()
            assert engine.ask(short).hit > 0, "no hit on a repeated short prompt: nothing is stored any more"

    # ---------------------------------------------------------------- concurrency

    @level(Level.CONCURRENCY)
    @requires("concurrent")
    @on("llama", dtypes=1)
    def test_concurrent_requests_answer_as_they_do_alone(self, bench: Bench) -> None:
        """Sixteen requests, some with shared prefixes: first all compute and store at once, then all load at once."""
        engine = bench.shared()
        requests = self._crowd(bench)
        for time in ("all new", "all stored"):
            engine.drop_device_cache()
            responses = engine.ask_all(requests)
            if time == "all stored":
                shown = f"{time}: {[dict(response.cached) for response in responses]}"
                assert any(response.hit for response in responses), f"no hits; {shown}"
                # KV that one request has loaded may be reused by others through the engine's own cache.
                assert min(sum(response.cached.values()) for response in responses) > 0, f"some had no hit; {shown}"
            self._all_right(bench, engine, requests, responses, time)

    @level(Level.CONCURRENCY)
    @requires("concurrent", "cancel")
    @on("llama", dtypes=1)
    def test_cancelled_requests_do_not_affect_others(self, bench: Bench) -> None:
        engine = bench.shared()
        crowd = self._crowd(bench)
        engine.ask_all(crowd[::3])
        mixed = [
            Request(tokens=request.tokens, max_new_tokens=12, cancel_after=1 + n % 5) if n % 2 else request
            for n, request in enumerate(crowd)
        ]
        responses = engine.ask_all(mixed)
        for request, response in zip(mixed, responses, strict=True):
            if request.cancel_after:
                assert len(response.tokens) < 12, "a request was not cancelled"
        self._all_right(bench, engine, mixed[::2], responses[::2], "together with cancelled ones")
        engine.drop_device_cache()
        self._all_right(bench, engine, crowd, engine.ask_all(crowd), "after cancelled ones")

    def _crowd(self, bench: Bench) -> list[Request]:
        trunks = [bench.chunks(3, more=0) for _ in range(3)]
        prompts = [trunks[n % 3] + bench.chunks(n % 2, more=5 + n) for n in range(AT_ONCE - 4)]
        prompts += [bench.chunks(2 + n) for n in range(4)]
        return [Request(tokens=prompt, max_new_tokens=12) for prompt in prompts]

    def _all_right(
        self, bench: Bench, engine: Engine, requests: list[Request], responses: list[Response], when: str
    ) -> None:
        for number, (request, response) in enumerate(zip(requests, responses, strict=True)):
            what = f"{when}: request {number + 1} of {len(requests)} at once"
            bench.right(engine, request, response, what, alone=False)

    # ---------------------------------------------------------------- chunked prefill, preemption

    @level(Level.CHUNKED_PREFILL)
    @requires("chunked_prefill")
    @on(exact_only=True)
    def test_prompts_that_the_engine_splits_are_cached_right(self, bench: Bench) -> None:
        """Adapter option `prefill_tokens`, the maximum number of prompt tokens per step: below and above the chunk size."""
        for step in (bench.chunk_tokens // 2, 3 * bench.chunk_tokens):
            disk = str(bench.new_folder())
            with bench.open(options={"prefill_tokens": step}, dram_bytes="64MiB", disk_path=disk) as engine:
                self._twice(bench, engine, [bench.chunks(8), bench.chunks(5)], f"prefill in steps of {step}")

    @level(Level.PREEMPTION)
    @requires("preemption")
    @on(exact_only=True)
    def test_preempted_requests_resume_correctly(self, bench: Bench) -> None:
        """Adapter option `device_tokens`, the capacity of the engine's own memory in tokens: less than the requests need."""
        requests = [Request(tokens=bench.chunks(6), max_new_tokens=2 * bench.chunk_tokens) for _ in range(6)]
        room = math.ceil(2.5 * 8) * bench.chunk_tokens
        with bench.open(
            options={"device_tokens": room}, dram_bytes="64MiB", disk_path=str(bench.new_folder())
        ) as engine:
            for time in ("first run", "second run"):
                for request, response in zip(requests, engine.ask_all(requests), strict=True):
                    same_tokens(response, bench.cold().recompute(request), f"{time}, with memory for 2.5 of 6 requests")

    def _twice(self, bench: Bench, engine: Engine, prompts: list[tuple[int, ...]], what: str) -> None:
        for prompt in prompts:
            for time in ("first run", "second run"):
                engine.drop_device_cache()
                response = engine.ask(prompt)
                if time == "second run":
                    assert response.hit >= bench.whole(len(prompt) - 1), f"{what}: a hit of {dict(response.cached)}"
                same_tokens(response, bench.cold().recompute(prompt), f"{what}, {time}")
