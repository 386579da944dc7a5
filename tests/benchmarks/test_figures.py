"""The arithmetic of `benchmarks/`, without an engine."""

import importlib.util
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))

    def loaded(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def test_prompts_are_the_same_in_every_process_and_others_for_other_seeds(load):
    words = load("engine_process").words
    assert words("a", 3, 49152) == words("a", 3, 49152)
    assert words("a", 3, 49152) != words("b", 3, 49152)
    assert min(words("a", 5000, 1100)) >= 1000
    assert max(words("a", 5000, 1100)) < 1100


def test_a_percentile_is_one_of_the_values(load):
    percentile = load("multi_round_chat").percentile
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0


def test_ratios_are_medians_of_pairs(load):
    ttft = load("vllm_ttft")
    assert ttft._paired([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert ttft._quartiles([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == [2.0, 4.0]


def test_the_plot_is_well_formed_and_shows_both_sides(load):
    chat = load("multi_round_chat")
    side = {"ttft_p50_by_round_s": [3.0, 2.0], "generated_tokens_per_s": 4.0}
    work = {"users": 2, "last_history_tokens": 10, "answer_tokens": 1, "vllm_kv_tokens": 5, "all_histories_tokens": 20}
    out = {"stock": side, "lmcache": side, "workload": work}
    root = ElementTree.fromstring(chat.plot(out))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2


def test_the_eviction_table_has_hits_and_cost_of_every_policy_and_capacity(load, tmp_path, capsys, monkeypatch):
    trace = tmp_path / "loop.jsonl"
    prompts = [list(range(10 * i, 10 * i + 10)) for i in (0, 1, 2, 0, 1, 2)]
    trace.write_text(
        "".join(
            f'{{"timestamp": {1000 * t}, "input_length": 5120, "hash_ids": {ids}}}\n' for t, ids in enumerate(prompts)
        )
    )
    table = load("eviction_table")
    arguments = ["table", str(trace), "--policy", "lru", "adaptive", "optimum-chained", "--percent", "50", "100"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--repeat", "1", "--json"])
    assert table.main() == 0
    cells = json.loads(capsys.readouterr().out)
    assert [(c["policy"], c["percent"], c["capacity"]) for c in cells] == [
        (policy, percent, capacity)
        for percent, capacity in ((50, 15), (100, 30))
        for policy in ("lru", "adaptive", "optimum-chained")
    ]
    assert [c["hit_rate"] for c in cells[3:]] == [0.5, 0.5, 0.5]
    assert cells[0]["hit_rate"] < cells[2]["hit_rate"]
    assert cells[0]["cost"] == 1.0
    assert cells[2]["cost"] is cells[2]["us_per_chunk"] is None
    monkeypatch.setattr(sys, "argv", [*arguments, "--repeat", "1"])
    table.main()
    out = capsys.readouterr().out
    assert "| loop | 50 % | 100 % |" in out
    assert "| lru | " in out
