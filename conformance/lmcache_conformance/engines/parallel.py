"""Tensor parallelism: ranks hold parts of the same KV, and there is a hit only if every rank has its part.

Adapter option `tensor_parallel`: number of ranks. Sessions are not forked unless the adapter supports it, because engines
start worker processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache.tiers.folder import parse_path
from lmcache_conformance.contract import Level
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, Engine, History, on, same_answer, same_tokens
from lmcache_conformance.labs.damage import object_files
from lmcache_conformance.runner.discover import find_adapter
from lmcache_conformance.runner.marks import level, requires

RANKS = 2
NEW = 12


class ParallelTests(EngineBase):
    """Two ranks, and changes between one and two."""

    @level(Level.RESTART)
    @requires("restart", "tensor_parallel=2")
    @on("llama", exact_only=True)
    def test_two_ranks_act_as_one(self, bench: Bench) -> None:
        """Ranks act on one plan, load from disk in new processes, and both miss what one of them has lost."""
        disk = bench.new_folder("ranks")
        prompt = bench.chunks(5)
        whole = bench.whole(len(prompt) - 1)
        history = History()
        with self._open(bench, disk, RANKS, history) as engine:
            first = engine.ask(prompt, max_new_tokens=NEW)
            again = engine.ask(prompt, max_new_tokens=NEW)
            assert again.hit >= whole, f"second request: a hit of only {dict(again.cached)}"
            same_tokens(again, first, "second request")
            if bench.capabilities.same_split:
                same_answer(again, engine.recompute(prompt, max_new_tokens=NEW), "two ranks, after a hit")
            engine.flush()
        by_rank = self._by_rank(disk)
        counts = {rank: len(paths) for rank, paths in by_rank.items()}
        assert len(counts) == RANKS, f"after a flush there are objects of heads {sorted(counts)} only"
        assert len(set(counts.values())) == 1, f"the ranks have written different numbers of objects: {counts}"
        # New processes that share nothing with the old ones, not even a hash seed.
        with self._open(bench, disk, RANKS, history, forked=False) as engine:
            got = engine.ask(prompt, max_new_tokens=NEW)
            assert got.hit >= whole, f"in new processes: a hit of only {dict(got.cached)}"
            same_tokens(got, first, "two ranks, from disk alone")
        for path in by_rank[max(by_rank)]:
            path.unlink()
        with self._open(bench, disk, RANKS, history) as engine:
            got = engine.ask(prompt, max_new_tokens=NEW)
            assert got.hit == 0, f"a hit of {dict(got.cached)} although one rank has lost its objects"
            same_tokens(got, first, "recomputed")

    @level(Level.KEYS)
    @requires("restart", "tensor_parallel=2")
    @on("llama", exact_only=True)
    def test_another_number_of_ranks_does_not_hit(self, bench: Bench) -> None:
        self._change_ranks(bench, "exact")

    @level(Level.APPROXIMATE)
    @requires("restart", "semantic", "tensor_parallel=2")
    @on("llama", exact_only=True)
    def test_another_number_of_ranks_hits_with_semantic_sharing(self, bench: Bench) -> None:
        self._change_ranks(bench, "semantic")

    def _change_ranks(self, bench: Bench, share: str) -> None:
        """Two ranks write, one rank reads and writes, two ranks read."""
        disk, history = bench.new_folder("ranks"), History()
        prompts = [bench.chunks(5), bench.chunks(4)]
        with self._open(bench, disk, RANKS, history, share=share) as engine:
            engine.ask(prompts[0], max_new_tokens=NEW)
            engine.flush()
        with self._open(bench, disk, 1, history, share=share) as engine:
            self._reads(bench, engine, prompts[0], share, f"written by {RANKS} ranks, read by one")
            engine.ask(prompts[1], max_new_tokens=NEW)
            engine.flush()
        with self._open(bench, disk, RANKS, history, share=share) as engine:
            self._reads(bench, engine, prompts[1], share, f"written by one rank, read by {RANKS}")

    def _reads(self, bench: Bench, engine: Engine, prompt: tuple[int, ...], share: str, what: str) -> None:
        got = engine.ask(prompt, max_new_tokens=NEW)
        expected = bench.whole(len(prompt) - 1) if share == "semantic" else 0
        assert got.hit == expected, f"{what}: a hit of {dict(got.cached)}, not of {expected} tokens"
        same_tokens(got, bench.cold().recompute(prompt, max_new_tokens=NEW), what)

    def _by_rank(self, disk: Path) -> dict[tuple[int, int], list[Path]]:
        found: dict[tuple[int, int], list[Path]] = {}
        for path in object_files(disk):
            id = parse_path(*path.parts[-3:])
            assert id is not None, f"not the name of an object file: {path.name}"
            found.setdefault(id.rect.heads, []).append(path)
        return found

    def _open(
        self, bench: Bench, disk: Path, ranks: int, history: History, *, forked: bool = True, **cache: Any
    ) -> Any:
        return bench.open(
            options={"tensor_parallel": ranks},
            history=history,
            # Several ranks are forked only if the adapter allows it.
            forked=forked and (ranks == 1 or bool(getattr(find_adapter(bench.adapter), "forks_ranks", False))),
            dram_bytes="64MiB",
            disk_path=str(disk),
            **cache,
        )
