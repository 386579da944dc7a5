"""Level `approximate`: one engine writes KV, another one with an equal spec and `share="semantic"` reads it.

Subclass and name two adapters, or two configurations of one:

    class TestHFReadsVLLM(CrossTests):
        writer = Side("vllm")
        reader = Side("hf")

With `share="semantic"` the reader loads exactly the writer's bytes; its responses then equal its own up to rounding: the same
tokens in float32, and log-probs within the bound that both adapters declare. Without it, every lookup is a clean miss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import lcm
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lmcache_conformance.contract import Level, Request, Response
from lmcache_conformance.engines.base import EngineBase, chunk_tokens_of
from lmcache_conformance.engines.bench import Bench, History, on, same_tokens
from lmcache_conformance.labs.damage import object_files, problem_of
from lmcache_conformance.runner.discover import find_adapter
from lmcache_conformance.runner.marks import level, requires

NEW = 16


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two engines: its adapter (entry point or `module:attribute`) and that adapter's options."""

    adapter: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class CrossTests(EngineBase):
    """A writer and a reader. `adapter` and `capabilities`, and so the cases, are the reader's."""

    writer: ClassVar[Side]
    reader: ClassVar[Side]

    def __init_subclass__(cls) -> None:
        if "reader" in vars(cls):
            cls.adapter = cls.reader.adapter

    @pytest.fixture
    def sides(self, bench: Bench) -> tuple[Bench, Bench]:
        """The test benches of writer and reader."""
        reason = find_adapter(self.writer.adapter).why_not()
        if reason is not None:
            pytest.skip(f"the writer is not installed here: {reason}")
        claims = find_adapter(self.writer.adapter).capabilities
        if bench.case.model not in claims.models or bench.case.dtype not in claims.dtypes:
            pytest.skip(f"the writer does not claim {bench.case}")
        bench.chunk_tokens = lcm(bench.chunk_tokens, chunk_tokens_of(self.writer.adapter))
        writer = Bench(
            self.writer.adapter,
            claims,
            bench.case,
            bench.folder,
            chunk_tokens=bench.chunk_tokens,
            timeout_s=bench.timeout_s,
        )
        writer.options, bench.options = self.writer.options, self.reader.options
        return writer, bench

    @level(Level.APPROXIMATE)
    @requires("semantic")
    @on(exact_only=True)
    def test_another_engines_kv_gives_the_readers_own_tokens_within_the_bound(self, sides: tuple[Bench, Bench]) -> None:
        writer, reader = sides
        bound = min(writer.capabilities.logprob_bound, reader.capabilities.logprob_bound)
        prompts = [reader.chunks(n) for n in (2, 6, 12)]
        disk = reader.new_folder("semantic")
        history = self._write(writer, disk, prompts, "semantic")
        with self._open(reader, disk, "semantic", history) as engine:
            worst = 0.0
            for number, prompt in enumerate(prompts):
                request = Request(tokens=prompt, max_new_tokens=NEW)
                got = engine.ask(request)
                whole = reader.whole(len(prompt) - 1)
                assert got.hit == whole, (
                    f"prompt {number + 1}: a hit of {dict(got.cached)}, not of the writer's {whole} tokens"
                )
                own = reader.cold().recompute(request)
                same_tokens(got, own, f"prompt {number + 1}, on the writer's KV")
                worst = max(worst, distance(got, own))
        assert worst <= bound, f"log-probs differ by {worst:.3g}, the adapters declare a bound of {bound:g}"
        assert any(got.logprob), "no log-probs are reported: the bound cannot be checked"

    @level(Level.APPROXIMATE)
    @requires("semantic")
    @on("llama", exact_only=True)
    def test_what_the_reader_finds_are_the_writers_bytes(self, sides: tuple[Bench, Bench]) -> None:
        """The reader leaves the writer's files unchanged and adds none for KV that was already stored."""
        writer, reader = sides
        prompt = reader.chunks(6, more=0)
        disk = reader.new_folder("semantic")
        history = self._write(writer, disk, [prompt], "semantic", new=1)
        before = {path: path.read_bytes() for path in object_files(disk)}
        assert before, "the writer has written no files"
        with self._open(reader, disk, "semantic", history) as engine:
            got = engine.ask(prompt, max_new_tokens=1)
            engine.flush()
            assert got.hit > 0, "no hit"
        after = {path: path.read_bytes() for path in object_files(disk)}
        for path, data in before.items():
            assert after.get(path) == data, f"{path.name} changed although it was only read"
            assert problem_of(path) is None
        more = len(after) - len(before)
        assert not more, f"the reader uses other keys for the same KV: it has added {more} files"

    @level(Level.APPROXIMATE)
    @requires("semantic")
    @on("llama", exact_only=True)
    def test_without_semantic_sharing_it_is_a_clean_miss(self, sides: tuple[Bench, Bench]) -> None:
        writer, reader = sides
        prompt = reader.chunks(6)
        disk = reader.new_folder("exact")
        history = self._write(writer, disk, [prompt], "exact")
        with self._open(reader, disk, "exact", history) as engine:
            got = engine.ask(prompt)
            assert got.hit == 0, f"a hit of {dict(got.cached)} on another engine's KV without semantic sharing"
            same_tokens(got, reader.cold().recompute(prompt), "after the miss")

    def _write(self, bench: Bench, disk: Path, prompts: list[tuple[int, ...]], share: str, new: int = NEW) -> History:
        history = History()
        with self._open(bench, disk, share, history) as engine:
            for prompt in prompts:
                engine.ask(prompt, max_new_tokens=new)
            engine.flush()
        return history

    def _open(self, bench: Bench, disk: Path, share: str, history: History) -> Any:
        return bench.open(
            history=history,
            dram_bytes="64MiB",
            disk_path=str(disk),
            share=share,
            model_identity=f"conformance/{bench.case.model}",  # engines would derive different identities from the weights
        )


def distance(got: Response, own: Response) -> float:
    """Returns the largest |Δ log-prob| of the sampled tokens, which must be the same in both responses."""
    return max((abs(a - b) for a, b in zip(got.logprob, own.logprob, strict=True)), default=0.0)


__all__ = ["CrossTests", "Side", "distance"]
