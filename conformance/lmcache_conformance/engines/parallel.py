"""Tensor parallel: several ranks hold parts of the same KV. A hit is one only if every rank has its part.

Adapter option `tensor_parallel`: how many ranks. Sessions start in processes of their own, for engines start workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache.tiers.folder import parse_path
from lmcache_conformance.contract import Level, Request
from lmcache_conformance.damage import object_files
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, Engine, History, on, same_answer, same_tokens
from lmcache_conformance.marks import level, requires

RANKS = 2
NEW = 12


class ParallelTests(EngineBase):
    """Two ranks, and one."""

    @level(Level.RESTART)
    @requires("restart", "two_ranks")
    @on("llama", exact_only=True)
    def test_two_ranks_share_one_plan_and_go_on_from_disk(self, bench: Bench) -> None:
        disk = bench.new_folder("ranks")
        prompt = bench.chunks(5)
        history = History()
        with self._open(bench, disk, RANKS, history) as engine:
            first = engine.ask(prompt, max_new_tokens=NEW)
            again = engine.ask(prompt, max_new_tokens=NEW)
            assert again.hit >= bench.whole(len(prompt) - 1), f"asked again: {dict(again.cached)}"
            same_tokens(again, first, "asked again")
            if bench.capabilities.same_split:
                same_answer(again, engine.recompute(prompt, max_new_tokens=NEW), "two ranks, after a hit")
            self._all_ranks_wrote(bench, engine, disk)
        with self._open(bench, disk, RANKS, history) as engine:
            got = engine.ask(prompt, max_new_tokens=NEW)
            assert got.hit >= bench.whole(len(prompt) - 1), f"in new processes: {dict(got.cached)}"
            same_tokens(got, first, "two ranks, from disk alone")

    @level(Level.FAULTS)
    @requires("restart", "two_ranks")
    @on("llama", exact_only=True)
    def test_what_one_rank_has_lost_is_a_miss_for_all(self, bench: Bench) -> None:
        disk = bench.new_folder("ranks")
        prompt = bench.chunks(6)
        history = History()
        with self._open(bench, disk, RANKS, history) as engine:
            first = engine.ask(prompt, max_new_tokens=NEW)
            engine.flush()
        by_rank = self._by_rank(disk)
        assert len(by_rank) == RANKS, f"objects of {sorted(by_rank)}"
        for path in by_rank[max(by_rank)]:
            path.unlink()
        with self._open(bench, disk, RANKS, history) as engine:
            got = engine.ask(prompt, max_new_tokens=NEW)
            assert got.hit == 0, f"one rank has lost its objects, and yet: {dict(got.cached)}"
            same_tokens(got, first, "computed anew")

    @level(Level.KEYS)
    @requires("restart", "two_ranks")
    @on("llama", exact_only=True)
    def test_another_number_of_ranks_does_not_hit(self, bench: Bench) -> None:
        for wrote, reads in ((RANKS, 1), (1, RANKS)):
            prompt, disk, history = self._written(bench, wrote, "exact")
            with self._open(bench, disk, reads, history) as engine:
                got = engine.ask(prompt, max_new_tokens=NEW)
                assert got.hit == 0, f"written by {wrote} ranks, read by {reads}: {dict(got.cached)}"
                same_tokens(got, bench.cold().recompute(prompt, max_new_tokens=NEW), "after the miss")

    @level(Level.APPROXIMATE)
    @requires("restart", "semantic", "two_ranks")
    @on("llama", exact_only=True)
    def test_another_number_of_ranks_reads_it_where_sharing_is_semantic(self, bench: Bench) -> None:
        for wrote, reads in ((RANKS, 1), (1, RANKS)):
            prompt, disk, history = self._written(bench, wrote, "semantic")
            with self._open(bench, disk, reads, history, share="semantic") as engine:
                got = engine.ask(prompt, max_new_tokens=NEW)
                whole = bench.whole(len(prompt) - 1)
                assert got.hit == whole, f"written by {wrote} ranks, read by {reads}: {dict(got.cached)} of {whole}"
                own = bench.cold().recompute(prompt, max_new_tokens=NEW)
                same_tokens(got, own, f"on the KV of {wrote} ranks")

    def _written(self, bench: Bench, ranks: int, share: str) -> tuple[tuple[int, ...], Path, History]:
        prompt, disk, history = bench.chunks(5), bench.new_folder("ranks"), History()
        with self._open(bench, disk, ranks, history, share=share) as engine:
            engine.ask(Request(tokens=prompt, max_new_tokens=NEW))
            engine.flush()
        return prompt, disk, history

    def _all_ranks_wrote(self, bench: Bench, engine: Engine, disk: Path) -> None:
        engine.flush()
        counts = {rank: len(paths) for rank, paths in self._by_rank(disk).items()}
        assert len(counts) == RANKS, f"objects of {sorted(counts)} after a flush"
        assert len(set(counts.values())) == 1, f"the ranks have written different numbers of objects: {counts}"

    def _by_rank(self, disk: Path) -> dict[tuple[int, int], list[Path]]:
        found: dict[tuple[int, int], list[Path]] = {}
        for path in object_files(disk):
            id = parse_path(*path.parts[-3:])
            assert id is not None, f"a file that no object is called: {path.name}"
            found.setdefault(id.rect.heads, []).append(path)
        return found

    def _open(self, bench: Bench, disk: Path, ranks: int, history: History, **cache: Any) -> Any:
        return bench.open(
            options={"tensor_parallel": ranks},
            history=history,
            forked=False,
            dram_bytes="64MiB",
            disk_path=str(disk),
            **cache,
        )
