"""Simulations compared with brute force and with the full index protocol, and on bad input."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import stat
from hashlib import blake2b
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from lmcache.cli.app import app
from lmcache.config import Config
from lmcache.control import Index
from lmcache.control.eviction import POLICIES
from lmcache.errors import ConfigError
from lmcache.observe.recorder import Recorder
from lmcache.plan import Chain, JobReport, Report
from lmcache.simulate.hardware import profile
from lmcache.simulate.page import _apart, page, size
from lmcache.simulate.queueing import servers_for, ttft
from lmcache.simulate.replay import Replay
from lmcache.simulate.run import ADMISSIONS, ControlPlane, simulate
from lmcache.simulate.trace import TraceError, read_traces
from lmcache.spec import ALL

PROFILE = profile("smollm2-135m", "h100")


def requests_of(seed: int, count: int = 300) -> list[list[int]]:
    """Prompts that continue earlier ones, as conversations do."""
    rng = random.Random(seed)
    said: list[list[int]] = [[0]]
    fresh = 1
    for _ in range(count):
        base = rng.choice(said[-30:] if rng.random() < 0.7 else [[0]])
        grown = rng.randrange(1, 6)
        said.append([*base[: rng.randrange(1, len(base) + 1)], *range(fresh, fresh + grown)])
        fresh += grown
    return said[1:]


def written(path: Path, prompts: list[list[int]]) -> Path:
    lines = [
        {"timestamp": 10 * i, "input_length": 512 * len(p), "output_length": 1, "hash_ids": p}
        for i, p in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def leading(prompt: list[int], held: set[int] | dict[int, int] | list[int]) -> int:
    return next((i for i, block in enumerate(prompt) if block not in held), len(prompt))


def naive_lru(prompts: list[list[int]], capacity: int) -> int:
    held: list[int] = []
    hits = 0
    for prompt in prompts:
        hits += leading(prompt, held)
        held = ([b for b in held if b not in prompt] + prompt)[-capacity:]
    return hits


def naive_optimum(prompts: list[list[int]], capacity: int) -> int:
    held: set[int] = set()
    hits = 0
    for now, prompt in enumerate(prompts):
        hits += leading(prompt, held)

        def again(block: int, now: int = now) -> int:
            return next((i for i in range(now + 1, len(prompts)) if block in prompts[i]), 10**9)

        held = {b for b in held | set(prompt) if again(b) < 10**9}
        while len(held) > capacity:
            held.remove(max(held, key=lambda b: (again(b), -b)))  # block ids increase along a prompt
    return hits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [8, 30])
def test_bounds_are_what_brute_force_finds(tmp_path, seed, capacity) -> None:
    prompts = requests_of(seed)
    trace = read_traces([written(tmp_path / "t", prompts)])

    def found(policy: str) -> int:
        return sum(simulate(trace, policy, {"dram": capacity}, PROFILE).hits.values())

    assert found("lru-textbook") == naive_lru(prompts, capacity)
    assert found("optimum") == naive_optimum(prompts, capacity)
    assert found("optimum-chained") >= found("optimum")
    assert found("infinite") == sum(leading(p, set().union(*prompts[:i])) for i, p in enumerate(prompts))
    assert all(found(policy) <= found("infinite") for policy in POLICIES)


def by_messages(index: Index, chain: Chain, owner: int, seq: list[int]) -> int:
    """Serves a prompt through plans and reports; returns the leading chunks found."""

    def obey() -> None:
        plan = index.take_plan()
        if plan.jobs:
            seq[0] += 1
            done = tuple(JobReport(job.id, (1,) * len(job.ops), True) for job in plan.jobs)
            index.report(Report(plan.epoch, 0, seq[0], done), 0.0)

    found = index.lookup(owner, chain, 10**9, 0.0)
    index.begin_load(owner, 0.0)
    stored = index.begin_store(owner, chain, first=0, last=len(chain.digests), now=0.0)
    obey()
    assert stored is not None
    index.forget(owner)
    return found.tokens // 512


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_replay_finds_and_keeps_what_the_index_does_with_all_its_messages(policy) -> None:
    full, quick = (Index([("kv", ALL)], 512, [40], policy=policy) for _ in range(2))
    replay, seq = Replay(quick), [0]
    for number, prompt in enumerate(requests_of(7)):
        chain = Chain(b"n" * 32, [block.to_bytes(32, "little") for block in prompt])
        assert replay.request(chain).chunks == by_messages(full, chain, number, seq)
        quick.check()
        full.check()
    assert {e.digest for e in full.state.pools[0].residents()} == {e.digest for e in quick.state.pools[0].residents()}


@pytest.mark.parametrize("admit", ADMISSIONS)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_prompt_of_less_than_a_chunk_is_served_and_finds_nothing(tmp_path, policy, admit) -> None:
    path = tmp_path / "t"
    line = {"t": 1, "tokens": 5, "chunk_tokens": 16, "keys": []}
    path.write_text("".join(json.dumps(line | {"keys": keys, "tokens": 40}) + "\n" for keys in ([], ["a"], [], ["a"])))
    result = simulate(read_traces([path]), policy, {"device": 1, "dram": 1, "disk": 1}, PROFILE, admit=admit)
    assert result.hits == {"device": 1}


def test_what_is_on_disk_is_found_and_a_full_disk_forgets(tmp_path) -> None:
    prompts = requests_of(3)
    trace = read_traces([written(tmp_path / "t", prompts)])
    room = {"dram": 2 * max(map(len, prompts)), "disk": 10**6}
    assert sum(simulate(trace, "lru", room, PROFILE, admit="all").hits.values()) == sum(
        simulate(trace, "infinite", room, PROFILE).hits.values()
    )
    plane = ControlPlane(trace, "lru", {"dram": 12, "disk": 20}, PROFILE, admit="all")
    for request in trace:
        plane.request(request)
        plane.index.check()
        assert len(plane.index.state.directories[0]) <= 20


def test_a_second_sight_writes_less_and_finds_no_less_where_the_disk_is_small(tmp_path) -> None:
    rng = random.Random(1)
    popular = [[10_000 + 4 * i + k for k in range(4)] for i in range(12)]
    # a few recurring prompts among many that never recur
    prompts = [rng.choice(popular) if i % 4 == 0 else [20_000 + 4 * i + k for k in range(4)] for i in range(2000)]
    trace = read_traces([written(tmp_path / "t", prompts)])
    everything, second = (
        simulate(trace, "lru", {"dram": 16, "disk": 60}, PROFILE, admit=admit) for admit in ("all", "second")
    )
    assert second.disk_written_chunks <= 0.6 * everything.disk_written_chunks
    assert second.hit_rate >= everything.hit_rate


def test_requests_wait_for_the_first_free_server() -> None:
    assert ttft([0, 0, 1, 10], [2, 2, 2, 2], 1) == [2, 4, 5, 2]
    assert ttft([0, 0, 1, 10], [2, 2, 2, 2], 2) == [2, 2, 3, 2]
    assert servers_for([0.0, 10.0], [8.0, 8.0]) == 2
    assert servers_for([0.0, 1e-9], [8.0, 8.0]) == 2, "a third would have nothing to do"
    assert servers_for([0.0, 5e-324], [8.0, 8.0]) == 2
    assert ttft([0, 0], [2, 2], 10**15) == [2, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"timestamp": 5', "truncated"),
        ('{"timestamp": 5, "input_length": 3}', "'hash_ids' is missing"),
        ('{"timestamp": -5, "input_length": 3, "hash_ids": []}', "-0.005"),
        ('{"timestamp": 5, "input_length": 3, "hash_ids": []}', "before the line above"),
        (
            '{"timestamp": 50, "input_length": 3, "hash_ids": [1, 2]}',
            "3 tokens are 1 blocks of 512 tokens, but there are 2 ids",
        ),
        (
            '{"timestamp": 50, "input_length": 4000, "hash_ids": [1, 2]}',
            "8 blocks .* 2 ids; give .* --block-tokens 2048",
        ),
        ('{"timestamp": 50, "input_length": 4000, "hash_ids": []}', "8 blocks .* 0 ids; give .* with --block-tokens "),
        ('{"t": 50, "tokens": 256, "chunk_tokens": 512, "keys": ["a", "b"]}', "2 chunks"),
        ('{"timestamp": 50, "input_length": 1024, "hash_ids": [1, 1]}', "twice"),
        ('{"timestamp": 50, "input_length": 1024, "hash_ids": ["a"]}', "hash_ids"),
        ('{"t": 50, "tokens": 3, "keys": []}', "'chunk_tokens' is missing"),
        ('{"t": 50, "tokens": 256, "chunk_tokens": 256, "keys": ["ab"]}', "tokens per chunk"),
        ("[]", "array"),
        (f'{{"timestamp": 50, "input_length": {2**63}, "hash_ids": [1]}}', "impossible"),
        (f'{{"timestamp": 50, "input_length": 512, "output_length": {2**63}, "hash_ids": [1]}}', "impossible"),
        (f'{{"t": 50, "tokens": 512, "chunk_tokens": {2**63}, "keys": ["ab"]}}', "impossible"),
    ],
)
def test_a_bad_line_is_named_and_can_be_left_out(tmp_path, line, reason) -> None:
    path = tmp_path / "t"
    good = '{"timestamp": 20, "input_length": 512, "hash_ids": [1]}\n'
    path.write_text(good + line + "\n" + good)
    with pytest.raises(TraceError, match=f"line 2: .*{reason}"):
        read_traces([path])
    trace = read_traces([path], skip_bad=True)
    assert (len(trace), trace.skipped) == (2, 1)


@pytest.mark.parametrize("block", [16, 64, 1024, 2048])
def test_blocks_of_another_size_are_read_only_if_it_is_given(tmp_path, block) -> None:
    path = tmp_path / "t"
    sizes = [4000 + 700 * turn for turn in range(40)]
    lines = [
        {"timestamp": turn, "input_length": tokens, "hash_ids": list(range(-(-tokens // block)))}
        for turn, tokens in enumerate(sizes)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TraceError, match=f"line 1: 4000 tokens are 8 blocks of 512 .* --block-tokens {block}"):
        read_traces([path])
    path.write_text(path.read_text() + '{"timestamp": 90, "input_length": 9, "hash_ids": [0]}\n')
    with pytest.raises(TraceError, match="40 lines do not fit the block size, 1 do; the first: 4000 tokens"):
        read_traces([path], skip_bad=True)
    sizes.append(9)
    trace = read_traces([path], block_tokens=block)
    assert (trace.chunk_tokens, [r.tokens for r in trace]) == (block, sizes)
    out = CliRunner().invoke(app, ["simulate", str(path), "--block-tokens", str(block), "--policy", "lru", "--json"])
    assert json.loads(out.stdout)["trace"]["chunk_tokens"] == block


def test_a_trace_may_leave_out_the_partial_block_at_the_end_of_prompts(tmp_path) -> None:
    path = tmp_path / "t"
    path.write_text(
        '{"timestamp": 0, "input_length": 1500, "hash_ids": [0, 1]}\n'
        '{"timestamp": 1, "input_length": 1500, "hash_ids": [0, 1, 2]}\n{"timestamp": 2, "input_length": 9, "hash_ids": []}\n'
    )
    assert read_traces([path]).accesses == 5
    with pytest.raises(TraceError, match="0 tokens per block"):
        read_traces([path], block_tokens=0)


def test_what_cannot_be_simulated_is_refused_with_a_hint(tmp_path) -> None:
    trace = read_traces([written(tmp_path / "t", requests_of(0, 5))])
    with pytest.raises(ConfigError, match="did you mean 'lfu'"):
        simulate(trace, "lfuu", {"dram": 5}, PROFILE)
    with pytest.raises(ConfigError, match="did you mean 'lru'"):
        simulate(trace, "LRU", {"dram": 5}, PROFILE)
    with pytest.raises(ConfigError, match=r"unknown policy '%%%': Known: lru, "):
        simulate(trace, "%%%", {"dram": 5}, PROFILE)
    with pytest.raises(ConfigError, match="at least one chunk"):
        simulate(trace, "lru", {"dram": 0}, PROFILE)
    with pytest.raises(ConfigError, match="did you mean 'llama-3-8b'"):
        profile("llama3-8b", "h100")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="impossible"):
            profile("llama-3-8b", "h100", rate=rate)
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="no request"):
        read_traces([tmp_path / "empty"])


def test_the_command_prints_one_json_document_and_draws_a_page(tmp_path) -> None:
    path = written(tmp_path / "t", requests_of(0))
    page = tmp_path / "page.html"
    options = ["--policy", "lru", "--policy", "optimum", "--capacity", "5%,0.2,1GiB", "--plot", str(page), "--json"]
    out = CliRunner().invoke(app, ["simulate", str(path), *options], catch_exceptions=False)
    assert out.exit_code == 0
    results = json.loads(out.stdout)["results"]
    assert [r["policy"] for r in results] == ["lru", "optimum"] * 3
    assert results[4]["capacity_chunks"] == (1 << 30) // (512 * 131072)
    assert all(0 <= r["hit_rate"] <= 1 for r in results)
    assert "<svg" in page.read_text()
    assert "http" not in page.read_text()


def test_policies_are_a_list_like_capacities(tmp_path) -> None:
    path = written(tmp_path / "t", requests_of(0))
    options = ["--policy", "lru, optimum", "--policy", "lfu", "--capacity", "5%", "--json"]
    out = CliRunner().invoke(app, ["simulate", str(path), *options], catch_exceptions=False)
    assert [r["policy"] for r in json.loads(out.stdout)["results"]] == ["lru", "optimum", "lfu"]


def test_a_trace_of_few_chunks_is_simulated_without_options(tmp_path) -> None:
    path = written(tmp_path / "t", [list(range(10))] * 2)
    out = CliRunner().invoke(app, ["simulate", str(path), "--policy", "lru", "--json"], catch_exceptions=False)
    assert [r["capacity_chunks"] for r in json.loads(out.stdout)["results"]] == [1, 2]
    refused = CliRunner().invoke(app, ["simulate", str(path), "--capacity", "1%"])
    assert isinstance(refused.exception, ConfigError), "given by hand"


def test_a_recording_holds_equal_keys_for_equal_chunks_and_goes_on_where_it_ended(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.touch(0o600)
    path.write_text('{"t":99.5,"tokens":0,"chunk_tokens":256,"keys":[]}\n')
    for _ in range(2):
        recorder = Recorder(path, 256)
        recorder.record(600, [b"a" * 32, b"b" * 32])
        recorder.record(300, [b"a" * 32])
        recorder.close()
        recorder.record(300, [b"a" * 32])
    before, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(before["t"] <= line["t"] < before["t"] + 60 for line in lines)
    assert lines[0]["keys"][0] == lines[1]["keys"][0] != lines[0]["keys"][1]
    assert lines[0]["keys"][0] != lines[2]["keys"][0], "another process has another secret"
    assert (b"a" * 32).hex()[:16] not in path.read_text()
    assert len(read_traces([path])) == 5
    assert stat.S_IMODE(fresh_mode(tmp_path / "new")) == 0o600


def fresh_mode(path: Path) -> int:
    Recorder(path, 256).close()
    return path.stat().st_mode


def test_a_recording_that_nobody_closes_is_whole(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path, 256)
    for _ in range(3):
        recorder.record(300, [b"a" * 32])
    assert len(path.read_text().splitlines()) < 3, "a burst is buffered"
    del recorder
    assert len(read_traces([path])) == 3


def test_a_recording_that_fails_is_one_log_line(tmp_path, caplog, monkeypatch) -> None:
    recorder = Recorder(tmp_path / "no" / "such", 256)
    recorder.record(300, [b"a" * 32])
    recorder.close()
    full = Recorder(tmp_path / "full", 256)
    monkeypatch.setattr("lmcache.observe.recorder.os.write", no_space)
    full.record(300, [b"a" * 32])
    full.record(300, [b"a" * 32])
    assert "No space left" in caplog.text
    assert caplog.text.count("trace-not-recorded") == 2


def no_space(fd: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_table_is_never_cut_off(tmp_path) -> None:
    path = written(tmp_path / "t", requests_of(0))
    out = CliRunner().invoke(app, ["simulate", str(path), "--tiers", "dram = 5%, disk=20%"], env={"COLUMNS": "40"})
    assert "disk writes" in out.stdout.splitlines()[0]
    assert "…" not in out.stdout


def test_options_that_cannot_work_are_refused_before_anything_is_simulated(tmp_path) -> None:
    path = str(written(tmp_path / "t", requests_of(0, 5)))

    def refusal(*options: str) -> str:
        with pytest.raises(ConfigError) as caught:
            CliRunner().invoke(app, ["simulate", path, *options], catch_exceptions=False)
        return str(caught.value)

    assert "gives dram twice" in refusal("--tiers", "dram=5%,dram=10%")
    assert "there is no folder" in refusal("--plot", str(tmp_path / "no" / "page.html"))


def test_figures_are_shown_even_if_the_page_cannot_be_written(tmp_path) -> None:
    (tmp_path / "page.html").mkdir()
    options = ["--policy", "lru", "--plot", str(tmp_path / "page.html"), "--json"]
    out = CliRunner().invoke(app, ["simulate", str(written(tmp_path / "t", requests_of(0))), *options])
    assert isinstance(out.exception, IsADirectoryError)
    assert json.loads(out.stdout)["results"]


def test_the_former_name_of_the_default_policy_is_accepted(tmp_path) -> None:
    path = written(tmp_path / "t", requests_of(0))
    out = CliRunner().invoke(app, ["simulate", str(path), "--policy", "density", "--capacity", "5%", "--json"])
    assert [result["policy"] for result in json.loads(out.stdout)["results"]] == ["adaptive"]


def test_unless_told_otherwise_a_full_disk_is_written_as_the_cache_writes_it(tmp_path) -> None:
    path = written(tmp_path / "t", requests_of(0))
    out = CliRunner().invoke(app, ["simulate", str(path), "--policy", "lru", "--tiers", "disk=5%", "--json"])
    assert json.loads(out.stdout)["trace"]["admit"] == Config().admission


LINE = b'{"t":99.5,"tokens":0,"chunk_tokens":256,"keys":[]}\n'


def test_a_recording_goes_on_after_a_line_that_was_cut_off(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(LINE + b'{"t":100.25,"tok')
    recorder = Recorder(path, 256)
    recorder.record(300, [b"a" * 32])
    recorder.close()
    first, second = read_traces([path])
    assert first.time == 99.5 <= second.time < 100


@pytest.mark.parametrize("held", [b"{}\n", b"[]\n", b'{"t":null}\n', b"notes\n", b'{"t":1', b"\xff\n", b"\n"])
def test_what_is_no_recording_stays_as_it_is(tmp_path, caplog, held) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(held)
    recorder = Recorder(path, 256)
    recorder.record(300, [b"a" * 32])
    recorder.close()
    assert path.read_bytes() == held
    assert "choose another file" in caplog.text


def test_two_recorders_do_not_share_a_file(tmp_path, caplog) -> None:
    path = tmp_path / "trace.jsonl"
    one, two = Recorder(path, 256), Recorder(path, 256)
    two.record(300, [b"b" * 32])
    one.record(300, [b"a" * 32])
    one.close()
    assert len(read_traces([path])) == 1
    assert caplog.text.count("its own file") == 1
    Recorder(path, 256).close()
    assert caplog.text.count("trace-not-recorded") == 1


def test_a_request_that_is_recorded_while_the_recorder_closes_is_left_out(tmp_path, monkeypatch) -> None:
    recorder = Recorder(tmp_path / "trace.jsonl", 256)
    hashed = blake2b

    def closing(*args, **kwargs):
        recorder.close()
        return hashed(*args, **kwargs)

    monkeypatch.setattr("lmcache.observe.recorder.blake2b", closing)
    recorder.record(256 * 3000, [b"a" * 32] * 3000)
    assert (tmp_path / "trace.jsonl").read_bytes() == b""


@pytest.mark.skipif("CONVERSATION_TRACE" not in os.environ, reason="CONVERSATION_TRACE names no conversation trace")
def test_the_published_figures_of_the_conversation_trace() -> None:
    trace = read_traces([os.environ["CONVERSATION_TRACE"]])
    shares = (1, 2, 5, 10, 20)
    for policy, expected in (
        ("lru-textbook", (4.34, 5.28, 11.05, 20.75, 28.00)),
        ("optimum", (17.83, 24.61, 32.62, 34.63, 34.63)),
    ):
        rates = [simulate(trace, policy, {"dram": trace.blocks * s // 100}, PROFILE).hit_rate for s in shares]
        assert [round(100 * rate, 2) for rate in rates] == list(expected)


class Balanced(HTMLParser):
    """Fails if a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_says_per_tier_how_large_it_was_and_only_what_there_is(tmp_path) -> None:
    trace = read_traces([written(tmp_path / "t", requests_of(1))])
    about = {
        "trace": "a<b.jsonl",
        "chunk_bytes": PROFILE.kv_bytes * 512,
        "distinct_chunks": trace.blocks,
        "admit": "adaptive",
    }
    grid = [{"dram": dram, "disk": 60} for dram in (8, 16, 17, 18, 40)]
    policies = ("lru", "lfu", "optimum", "infinite")
    results = [simulate(trace, p, room, PROFILE, admit="adaptive") for room in grid for p in policies]
    text = page(about, results)
    parsed = Balanced()
    parsed.feed(text)
    assert parsed.open == []
    assert "a&lt;b.jsonl" in text
    head, *rows = parsed.rows
    assert head[:3] == ["policy", "dram", "disk"]
    assert head[-1] == "disk written"
    assert rows[0][:3] == ["lru", "90.0 MiB", "675 MiB"]
    assert rows[2][:3] == ["optimum", "765 MiB", ""]
    assert {len(row) for row in rows} == {len(head)}
    assert text.count("<td class=best>") >= len(grid)
    drawing = ElementTree.fromstring(re.search(r"<svg.*?</svg>", text)[0])
    labels = [(float(t.get("x")), float(t.get("y")), t.text) for t in drawing.iter("text")]
    ticks = [(x, label) for x, y, label in labels if "iB" in label]
    assert all(b - a >= 60 for (a, _), (b, _) in pairwise(ticks))
    ends = sorted(y for x, y, label in labels if label.endswith("%") and x > 400)
    assert len(ends) == 4
    assert all(b - a >= 14 for a, b in pairwise(ends))
    plain = page({}, [simulate(trace, "lru", {"dram": 8}, PROFILE)])
    assert "disk" not in plain
    assert "italics" not in plain


def test_labels_stay_in_the_drawing_and_sizes_have_three_digits() -> None:
    assert _apart([10.0, 12.0, 300.0, 315.0, 316.0]) == [10.0, 25.0, 286.0, 301.0, 316.0]
    assert [size(n) for n in (0, 1023, 1536, 20 << 20, 200 << 30, 5000 << 30)] == [
        "0 B",
        "1,023 B",
        "1.50 KiB",
        "20.0 MiB",
        "200 GiB",
        "4.88 TiB",
    ]


def test_a_recording_goes_into_no_file_that_others_read_or_have_placed(tmp_path, caplog, monkeypatch) -> None:
    there = tmp_path / "there.jsonl"
    there.touch()
    there.chmod(0o666)
    record_one(there)
    assert len(there.read_text().splitlines()) == 1
    assert stat.S_IMODE(there.stat().st_mode) == 0o600
    victim = tmp_path / "victim"
    victim.touch(0o600)
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.link(victim, tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo")
    assert caplog.messages == []
    for name, why in (
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("hard", "hard links"),
        ("fifo", "regular file"),
    ):
        record_one(tmp_path / name)
        assert why in caplog.messages.pop()
        caplog.clear()
    assert victim.read_text() == ""
    assert not (tmp_path / "nothing").exists()
    monkeypatch.setattr("lmcache.observe.recorder.os.geteuid", lambda: os.getuid() + 1)
    record_one(there)
    assert "belongs to another user" in caplog.messages[-1]
    assert len(there.read_text().splitlines()) == 1


def record_one(path: Path) -> None:
    recorder = Recorder(path, 256)
    recorder.record(300, [b"a" * 32])
    recorder.close()
