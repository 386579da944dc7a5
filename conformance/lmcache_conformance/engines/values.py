"""Levels `tokens`, `logits`, `bytes`, `restart`, `miss`: loaded KV is the KV that was computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmcache_conformance.contract import Level, Request, Response
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, Engine, on, same_answer, same_bits, same_tokens, varied
from lmcache_conformance.labs.damage import object_files, poison, problem_of
from lmcache_conformance.labs.models import REAL
from lmcache_conformance.runner.discover import find_adapter
from lmcache_conformance.runner.marks import level, requires

NEW = 20
"""Tokens generated per round: more than a chunk, so that some chunks contain both prompt and generated tokens."""

LONG = 2_600
"""Tokens of a long prompt: beyond 2,048, and below the 4,096 positions of the tiny models."""


def dialogue(bench: Bench, engine: Engine, rounds: int, *, first: int = 70) -> Iterator[tuple[Request, Response]]:
    """Yields the rounds of a chat: each prompt is the previous one, its answer, and new tokens. Checks that later rounds hit.

    The lengths cover all positions relative to a chunk boundary: the last token of the second answer, which has no KV yet,
    would complete a chunk; the third prompt ends at a chunk boundary.
    """
    prompt = bench.prompt(first)
    before = 0
    for number in range(rounds):
        request = Request(tokens=prompt, max_new_tokens=NEW)
        response = engine.ask(request)
        assert response.hit >= bench.whole(before), (
            f"round {number + 1}: a hit of only {response.hit} tokens {dict(response.cached)}, although the previous round's "
            f"prompt of {before} tokens is a prefix of this one{engine.log()}"
        )
        yield request, response
        before = len(prompt)
        prompt = prompt + response.tokens
        to_boundary = [-(len(prompt) + NEW), -len(prompt)][number] % bench.chunk_tokens if number < 2 else 9
        prompt += bench.prompt(to_boundary or bench.chunk_tokens)


class ValueTests(EngineBase):
    """Values after a hit."""

    # ---------------------------------------------------------------- tokens and logits

    @level(Level.LOGITS)
    @requires("logprobs", "same_split")
    def test_logits_after_a_hit_are_those_of_recomputation_in_the_same_split(self, bench: Bench, full: bool) -> None:
        engine = bench.shared()
        for number, (request, response) in enumerate(dialogue(bench, engine, 6 if full else 4)):
            same_bits(response, engine.recompute(request), f"round {number + 1}")

    @level(Level.TOKENS)
    @requires("same_split")
    def test_tokens_after_a_hit_are_those_of_recomputation_in_the_same_split(self, bench: Bench, full: bool) -> None:
        engine = bench.shared()
        responses = []
        for number, (request, response) in enumerate(
            dialogue(bench, engine, 6 if full else 4, first=1500 if bench.case.model in REAL else 150)
        ):
            same_tokens(response, engine.recompute(request), f"round {number + 1}")
            responses.append(response)
        varied(responses)

    @level(Level.TOKENS)
    @on(exact_only=True)
    def test_in_float32_tokens_after_a_hit_are_those_of_an_engine_that_has_cached_nothing(
        self, bench: Bench, full: bool
    ) -> None:
        engine, cold = bench.shared(), bench.cold()
        responses = []
        for number, (request, response) in enumerate(dialogue(bench, engine, 6 if full else 4, first=40)):
            same_tokens(
                response, cold.recompute(request), f"round {number + 1}, compared with a one-shot run of a fresh engine"
            )
            responses.append(response)
        varied(responses)

    @level(Level.LOGITS)
    @requires("logprobs", "same_split")
    def test_asking_again_and_again_changes_nothing(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = bench.chunks(5)
        engine.ask(prompt)
        for time in range(3):
            engine.drop_device_cache()
            response = engine.ask(prompt)
            assert response.hit >= bench.whole(len(prompt)), (
                f"repetition {time + 1}: a hit of only {dict(response.cached)}"
            )
            same_bits(response, engine.recompute(prompt), f"repetition {time + 1}")

    @level(Level.TOKENS)
    @on("llama", dtypes=1)
    def test_a_hundred_hits_of_one_process_are_all_right(self, bench: Bench) -> None:
        engine = bench.shared()
        prompts = [bench.chunks(2, more=1 + n) for n in range(10)]
        wanted: dict[tuple[int, ...], Response] = {}
        for prompt in prompts:
            engine.ask(prompt, max_new_tokens=1)
        for number in range(100):
            prompt = prompts[number % len(prompts)]
            engine.drop_device_cache()
            response = engine.ask(prompt, max_new_tokens=1)
            what = f"hit {number + 1} of 100"
            assert response.hit == bench.whole(len(prompt)), f"{what}: only {dict(response.cached)}"
            if prompt not in wanted:
                bench.right(engine, Request(tokens=prompt, max_new_tokens=1), response, what)
            same_answer(response, wanted.setdefault(prompt, response), what)

    @level(Level.TOKENS)
    @on("llama", dtypes=1)
    def test_a_prompt_of_thousands_of_tokens_hits_right(self, bench: Bench) -> None:
        """A hit, and a hit on its first part: loads have a beginning, a middle and an end beyond 2,048 tokens."""
        engine = bench.shared()
        prompt = bench.prompt(bench.whole(LONG) + 3)
        engine.ask(prompt)
        for part in (prompt, prompt[: bench.whole(LONG) - bench.chunk_tokens + 1]):
            engine.drop_device_cache()
            response = engine.ask(part)
            what = f"a prompt of {len(part)} tokens"
            assert response.hit == bench.whole(len(part)), f"{what}: a hit of only {dict(response.cached)}"
            bench.right(engine, part, response, what)

    @level(Level.LOGITS)
    @requires("logprobs", "same_split")
    def test_prompts_with_a_common_prefix_share_it(self, bench: Bench) -> None:
        engine = bench.shared()
        trunk = bench.chunks(4, more=0)
        engine.ask(trunk + bench.chunks(1))
        for branch in range(3):
            engine.drop_device_cache()
            prompt = trunk + bench.chunks(1, more=branch)
            response = engine.ask(prompt)
            assert response.hit == len(trunk), (
                f"branch {branch}: a hit of {dict(response.cached)}, not of the {len(trunk)} tokens of the shared prefix"
            )
            same_bits(response, engine.recompute(prompt), f"branch {branch}")

    @level(Level.LOGITS)
    @requires("logprobs", "same_split", "device_cache")
    def test_a_hit_may_begin_in_the_engines_own_cache_and_go_on_in_ours(self, bench: Bench) -> None:
        """The first chunks of a prompt are in the engine's own cache, recomputed; the rest is loaded, and continues them."""
        engine = bench.shared()
        prompt = bench.chunks(6)
        engine.ask(prompt)
        half = engine.ask(prompt[: bench.chunk_tokens * 3 + 1], max_new_tokens=1)
        assert half.hit == 3 * bench.chunk_tokens
        response = engine.ask(prompt, keep_device_cache=True)
        own = response.cached.get("device", 0)
        assert own > 0, f"the engine's own cache kept nothing of the previous prompt: {dict(response.cached)}"
        assert own + response.hit >= bench.whole(len(prompt)), f"{dict(response.cached)} of {len(prompt)} tokens"
        assert response.hit > 0, "nothing was loaded from the cache under test"
        same_bits(
            response, engine.recompute(prompt), "half from the engine's own cache, half from the cache under test"
        )

    # ---------------------------------------------------------------- restart

    @level(Level.RESTART)
    @requires("restart")
    def test_a_new_process_goes_on_from_disk_alone(self, bench: Bench, full: bool) -> None:
        writer = bench.shared()
        *_, (request, response) = dialogue(bench, writer, 2)
        follow = Request(tokens=request.tokens + response.tokens + bench.prompt(9), max_new_tokens=NEW)
        expected = writer.recompute(follow) if bench.capabilities.same_split else None
        writer.flush()
        with bench.open(dram_bytes="64MiB", disk_path=str(bench.shared_disk), history=writer.history) as engine:
            self._goes_on(bench, engine, request, follow, expected)

    @level(Level.RESTART)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_names_do_not_depend_on_the_process(self, bench: Bench) -> None:
        """Two new processes, one after the other, with different hash seeds."""
        disk = bench.new_folder()
        settings: dict[str, Any] = {"dram_bytes": "64MiB", "disk_path": str(disk), "forked": False}
        with bench.open(**settings, environment={"PYTHONHASHSEED": "1"}) as engine:
            *_, (request, response) = dialogue(bench, engine, 2)
            follow = Request(tokens=request.tokens + response.tokens + bench.prompt(9), max_new_tokens=NEW)
            expected = engine.recompute(follow) if bench.capabilities.same_split else None
        with bench.open(**settings, environment={"PYTHONHASHSEED": "2"}, history=engine.history) as engine:
            self._goes_on(bench, engine, request, follow, expected)

    def _goes_on(
        self, bench: Bench, engine: Engine, before: Request, follow: Request, expected: Response | None
    ) -> None:
        for time in ("first request", "second request"):
            got = engine.ask(follow)
            assert got.hit >= bench.whole(len(before.tokens)), (
                f"{time}: a hit of {dict(got.cached)} in a new process, although a prompt of {len(before.tokens)} tokens "
                "was flushed to disk by the previous process"
            )
            if expected is not None and time == "first request":
                same_answer(got, expected, time)
            if bench.case.exact:
                same_tokens(
                    got, bench.cold().recompute(follow), f"{time}, compared with a one-shot run of a fresh engine"
                )
            engine.drop_device_cache()

    @level(Level.RESTART)
    @requires("restart")
    @on("llama", "gemma3", exact_only=True)
    def test_in_a_new_process_shorter_prompts_hit_right_after_a_longer_one(self, bench: Bench) -> None:
        """A long hit loads only the end of a sliding window: the KV before it is missing and must not be stored."""
        disk = bench.new_folder()
        prompt = bench.chunks(8)
        with bench.open(dram_bytes="64MiB", disk_path=str(disk)) as engine:
            engine.ask(prompt)
            engine.flush()
        with bench.open(dram_bytes="64MiB", disk_path=str(disk), history=engine.history) as engine:
            for count in (8, 5, 3):
                part = prompt[: count * bench.chunk_tokens + 1]
                response = engine.ask(part)
                what = f"the first {count} of 8 chunks, after longer prompts"
                assert response.hit == bench.whole(len(part)), f"{what}: a hit of {dict(response.cached)}"
                same_tokens(response, bench.cold().recompute(part), what)

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_a_hit_is_read_from_the_files_and_used(self, bench: Bench) -> None:
        """Other values with matching checksums are written into the files: a reported hit must then change the response."""
        disk = bench.new_folder()
        prompt = bench.chunks(6)
        with bench.open(dram_bytes="64MiB", disk_path=str(disk)) as engine:
            honest = engine.ask(prompt)
            engine.flush()
        files = object_files(disk)
        assert files, f"there are no files in {disk} after a prompt of {len(prompt)} tokens was flushed"
        for path in files:
            poison(path)
            assert problem_of(path) is None
        with bench.open(dram_bytes="64MiB", disk_path=str(disk), history=engine.history) as engine:
            poisoned = engine.ask(prompt)
        assert poisoned.hit > 0, "no hit on intact files"
        moved = poisoned.logprobs != honest.logprobs if honest.logprobs else poisoned.tokens != honest.tokens
        assert moved, (
            f"a hit of {dict(poisoned.cached)} is reported on files whose values were replaced, but the response is unchanged: "
            "the tokens reported as cached were not used"
        )

    @level(Level.BYTES)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_files_are_whole_and_nothing_is_written_beside_them(self, bench: Bench) -> None:
        place = bench.new_folder("sandbox")
        disk, cwd, home, temp = (place / name for name in ("disk", "cwd", "home", "tmp"))
        for folder in (cwd, home, temp):
            folder.mkdir(parents=True)
        environment = {"HOME": str(home), "TMPDIR": str(temp), "XDG_CACHE_HOME": str(home / ".cache")}
        with bench.open(dram_bytes="64MiB", disk_path=str(disk), cwd=cwd, environment=environment) as engine:
            for _ in dialogue(bench, engine, 2):
                pass
            engine.flush()
            files = object_files(disk)
            assert files, f"there are no files in {disk} after a flush"
            for path in files:
                assert (problem := problem_of(path)) is None, f"{path.name}: {problem}"
        beside = [path for path in place.rglob("*") if path.is_file() and disk not in path.parents]
        allowed = (*self.may_write, *getattr(find_adapter(bench.adapter), "may_write", ()))
        beside = [path for path in beside if not any(path.match(pattern) for pattern in allowed)]
        assert not beside, f"written outside of the disk tier's folder: {_names(beside, place)}"
        left = [path for path in disk.rglob("*") if path.is_file() and ".tmp-" in path.name]
        assert not left, f"temporary files are left in the folder: {_names(left, place)}"

    # ---------------------------------------------------------------- miss

    @level(Level.MISS)
    @on(dtypes=1)
    def test_what_was_never_stored_is_never_a_hit(self, bench: Bench, full: bool) -> None:
        engine = bench.shared()
        stored = bench.chunks(6, more=0)
        engine.ask(stored)
        shift = stored[1:] + stored[:1]
        chunk = bench.chunk_tokens
        halves = stored[3 * chunk :] + stored[: 3 * chunk]
        changed = (stored[0] % 900 + 7 if stored[0] % 900 + 7 != stored[0] else stored[0] + 1, *stored[1:])
        strangers = {
            "shifted by one token": shift,
            "halves swapped": halves,
            "first chunk removed": stored[chunk:],
            "another first token": changed,
        }
        strangers |= {
            f"random prompt {n}": bench.prompt(16 * chunk if full else 6 * chunk) for n in range(20 if full else 4)
        }
        for what, prompt in strangers.items():
            response = engine.ask(prompt, max_new_tokens=1)  # also checks hits against the history
            assert response.hit == 0, f"{what}: a hit of {dict(response.cached)} on a prompt that was never stored"

    @level(Level.MISS)
    def test_the_last_prompt_token_is_always_computed(self, bench: Bench) -> None:
        engine = bench.shared()
        chunk = bench.chunk_tokens
        prompt = bench.chunks(4, more=0)
        first = engine.ask(prompt)
        for tokens in (len(prompt), 3 * chunk, 3 * chunk + 1, chunk, chunk + 1, chunk - 1, 1):
            engine.drop_device_cache()
            part = prompt[:tokens]
            response = engine.ask(part)
            assert response.hit <= tokens - 1
            if bench.capabilities.same_split:
                same_answer(response, engine.recompute(part), f"the first {tokens} tokens of a stored prompt")
        if bench.case.exact:
            same_tokens(engine.ask(prompt), first, "the first prompt again")


def _names(paths: list[Path], base: Path) -> str:
    shown = [str(path.relative_to(base)) for path in paths[:5]]
    return ", ".join(shown) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
