"""`lmcache bench io`: measurements are correct, complete and reported; their speed is not tested."""

from __future__ import annotations

import pytest
import torch
from clilab import Run, parsed

from lmcache.bench import paged
from lmcache.bench.paged import LAYOUTS, PAGES, PATTERNS, Shape, measure, pool, slots_of

TINY = Shape("tiny", 2, 2, 8)
KEYS = {
    "model",
    "block_tokens",
    "layout",
    "pattern",
    "threads",
    "memcpy_gbs",
    "store_gbs",
    "store_ratio",
    "retrieve_gbs",
    "retrieve_ratio",
    "checksum_gbs",
    "checksum_ratio",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pattern_and_number_of_threads_is_measured_and_threads_are_put_back(layout: str) -> None:
    before = torch.get_num_threads()
    results = list(measure(TINY, layout, block_tokens=16, threads=(1, 2), tokens=256, chunk_tokens=64, repeat=1))
    assert [(r.pattern, r.threads) for r in results] == [(p, t) for p in PATTERNS for t in (1, 2)]
    assert all(r.store_ratio > 0 and r.retrieve_ratio > 0 and r.memcpy_gbs > 0 for r in results)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("pattern", PATTERNS)
def test_slots_are_whole_blocks_of_the_pool(pattern: str) -> None:
    slots = slots_of(pattern, 256, 512, 16)
    assert slots.unique().numel() == 256
    assert int(slots.min()) >= 0
    assert int(slots.max()) < 512
    blocks = slots.view(-1, 16)
    assert (blocks == blocks[:, :1] + torch.arange(16)).all()
    assert (blocks[:, 0] % 16 == 0).all()
    in_order = bool((blocks[1:, 0] == blocks[:-1, 0] + 16).all())
    assert in_order == (pattern == "contiguous")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pools_are_as_large_as_the_engine_says(layout: str) -> None:
    assert pool(TINY, layout, 16, 512).num_slots(0) == 512


def test_memory_figures_as_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "SHAPES", {"tiny": TINY})
    out = parsed(run("bench", "io", "--part", "memory", "--quick", "--threads", 1, "--json"))
    assert set(out) == {"machine", "memory"}
    assert all(set(case) == KEYS for case in out["memory"])
    cases = {(c["block_tokens"], c["layout"], c["pattern"], c["threads"]) for c in out["memory"]}
    assert cases == {(b, name, p, 1) for b in (16, 128) for name in LAYOUTS for p in PATTERNS[:2]}


def test_canonical_figures_as_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "SHAPES", {"tiny": Shape("tiny", 2, 2, 32)})
    out = parsed(run("bench", "io", "--part", "canonical", "--quick", "--threads", 1, "--threads", 2, "--json"))
    assert set(out) == {"machine", "canonical"}
    ways = ("store", "retrieve", "unpack", "pack")
    figures = {f"{way}_{unit}" for way in ways for unit in ("gbs", "ratio")}
    named = {"model", "block_tokens", "packing", "threads", "memcpy_gbs"}
    assert all(set(case) == named | figures for case in out["canonical"])
    assert all(case[figure] > 0 for case in out["canonical"] for figure in figures)
    cases = [(c["packing"], c["block_tokens"], c["threads"]) for c in out["canonical"]]
    assert cases == [(name, block, n) for name, blocks in PAGES.items() for block in blocks for n in (1, 2)]


def test_figures_for_people(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "SHAPES", {"tiny": TINY})
    out = run("bench", "io", "--part", "memory", "--quick", "--threads", 1)
    assert out.exit_code == 0
    assert "store_ratio" in out.stdout


def test_an_unknown_model_or_part_is_refused_with_the_known_ones(run: Run) -> None:
    for option, known in (("--model", "smollm2-135m"), ("--part", "lookup")):
        out = run("bench", "io", option, "nonsense")
        assert out.exit_code == 2
        assert known in out.output


@pytest.mark.parametrize("options", [("--threads", 0), ("--threads", -1), ("--model", "9b")])
def test_what_cannot_be_measured_is_refused_before_anything_is(run: Run, options: tuple[object, ...]) -> None:
    result = run("bench", "io", "--part", "lookup", "--quick", *options)
    assert result.exit_code == 2
    assert f"Invalid value for {options[0]}" in result.output.replace("'", "")
    assert "lookup_mtokens_per_s" not in result.output
