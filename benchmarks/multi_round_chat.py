"""vLLM: a chat of many users over several rounds, stock with its prefix cache on, and the same with our DRAM behind it.

Every user sends his whole history and something new, and sends again as soon as he has his answer. All histories together
are several times larger than vLLM's KV space, so that by the time a user comes back vLLM has given his blocks to others
(least recently used first); ours still has them. Histories are long and answers short, as with documents, tools and code:
that is where a cache matters. With everything in vLLM's own space, or with short histories, there is nothing to gain.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from engine_process import THREADS, EngineOptions, EngineProcess, machine, model_folder, rounded, tell

SIDES = ("stock", "lmcache")
COLOURS = {"stock": "#9aa5b1", "lmcache": "#2f6fde"}

EXAMPLES = """\
examples:
  multi_round_chat.py                                   about 10 minutes on two cores
  multi_round_chat.py --json --repeat 2 > chat.json     stock, ours, ours, stock; progress on standard error
  multi_round_chat.py --plot chat.svg
  multi_round_chat.py --users 4 --rounds 3 --first 512 --kv-tokens 1280    a quick look
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    longest = options.first + (options.rounds - 1) * (options.more + options.new) + options.new
    cache = {"chunk_tokens": options.chunk_tokens, "dram_bytes": options.dram_bytes}
    engines = {
        side: EngineOptions(
            model=model_folder(options.model),
            cache=cache if side == "lmcache" else None,
            blocks=options.kv_tokens // options.block_tokens + 1,
            block_tokens=options.block_tokens,
            max_tokens=longest + 1,
            batch_tokens=max(options.batch_tokens, options.block_tokens),
            batch_requests=options.users,
            threads=options.threads,
        )
        for side in SIDES
    }
    if longest > options.kv_tokens:
        sys.exit(
            f"a conversation grows to {longest} tokens and vLLM's KV space is {options.kv_tokens}: give more --kv-tokens"
        )
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    facts: dict[str, Any] = {}
    for turn in range(options.repeat):
        for side in SIDES[:: -1 if turn % 2 else 1]:
            with EngineProcess(engines[side], f"run {turn + 1}, {side}") as engine:
                facts[side] = engine.facts
                runs[side].append(_run(engine, options, turn))
    sides = {side: _combined(found) for side, found in runs.items()}
    stock, ours = sides["stock"], sides["lmcache"]
    out = {
        "throughput_ratio": ours["generated_tokens_per_s"] / stock["generated_tokens_per_s"],
        "ttft_p50_ratio": stock["ttft_p50_s"] / ours["ttft_p50_s"],
        "ttft_p99_ratio": stock["ttft_p99_s"] / ours["ttft_p99_s"],
        "workload": {
            "users": options.users,
            "rounds": options.rounds,
            "first_prompt_tokens": options.first,
            "more_tokens_a_round": options.more,
            "answer_tokens": options.new,
            "last_history_tokens": longest,
            "all_histories_tokens": longest * options.users,
            "vllm_kv_tokens": options.kv_tokens,
            "at_once": options.users,
        },
        "cache": cache,
        "engines": facts,
        **sides,
        "machine": machine(),
    }
    if options.plot:
        Path(options.plot).write_text(plot(out), encoding="utf-8")
        tell(f"wrote {options.plot}")
    print(json.dumps(rounded(out)) if options.json else _shown(out))


def _run(engine: EngineProcess, options: argparse.Namespace, turn: int) -> dict[str, Any]:
    chat = {"first": options.first, "more": options.more, "new": options.new}
    tell(f"{engine.name}: warming up")
    engine.ask("chat", users=2, rounds=min(2, options.rounds), seed=f"warm {turn}", **chat)
    before = engine.ask("counters")
    tell(f"{engine.name}: {options.users} users, {options.rounds} rounds")
    found = engine.ask("chat", users=options.users, rounds=options.rounds, seed=f"run {turn}", **chat)
    turns = found["turns"]
    if len(turns) != options.users * options.rounds:
        raise RuntimeError(f"{len(turns)} answers, {options.users * options.rounds} were expected")
    generated = sum(t["answer"]["tokens"] for t in turns)
    tell(f"{engine.name}: {generated} tokens in {found['seconds']:.1f} s")
    counters = {name: value - before.get(name, 0) for name, value in engine.ask("counters").items()}
    return {"seconds": found["seconds"], "generated_tokens": generated, "turns": turns, "counters": counters}


def _combined(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    turns = [turn for run in runs for turn in run["turns"]]
    firsts = [turn["answer"]["first_s"] for turn in turns]
    rounds = sorted({turn["round"] for turn in turns})
    return {
        "generated_tokens_per_s": median(run["generated_tokens"] / run["seconds"] for run in runs),
        "ttft_p50_s": percentile(firsts, 50),
        "ttft_p99_s": percentile(firsts, 99),
        "ttft_p50_by_round_s": [
            percentile((t["answer"]["first_s"] for t in turns if t["round"] == number), 50) for number in rounds
        ],
        "cached_tokens_by_round": [
            sum(t["answer"]["cached"] for t in turns if t["round"] == number) // len(runs) for number in rounds
        ],
        "seconds": [run["seconds"] for run in runs],
        "raw_ttft_s": [
            [t["round"], t["user"], t["answer"]["first_s"], t["answer"]["total_s"], t["answer"]["cached"]]
            for t in turns
        ],
        "counters": [run["counters"] for run in runs],
    }


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


# ---------------------------------------------------------------- for people


def _shown(out: dict[str, Any]) -> str:
    work = out["workload"]
    lines = [
        f"{work['users']} users, {work['rounds']} rounds, histories of {work['first_prompt_tokens']}–"
        f"{work['last_history_tokens']} tokens, answers of {work['answer_tokens']}; "
        f"vLLM holds {work['vllm_kv_tokens'] / work['all_histories_tokens']:.0%} of them",
        "           tokens/s   TTFT p50   TTFT p99",
    ]
    for side in SIDES:
        s = out[side]
        lines.append(f"{side:10s} {s['generated_tokens_per_s']:8.2f} {s['ttft_p50_s']:8.2f} s {s['ttft_p99_s']:8.2f} s")
    lines.append(
        f"better by  {out['throughput_ratio']:8.2f} {out['ttft_p50_ratio']:8.2f}   {out['ttft_p99_ratio']:8.2f}"
    )
    return "\n".join(lines)


def plot(out: dict[str, Any]) -> str:
    """An SVG: median TTFT by round as lines, output throughput as bars."""
    width, height, left, top, tall = 640, 300, 56, 40, 190
    rounds = len(out["stock"]["ttft_p50_by_round_s"])
    most = max(max(out[side]["ttft_p50_by_round_s"]) for side in SIDES)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-weight="bold">Median time to first token by round, s</text>',
        '<text x="430" y="22" font-weight="bold">Generated tokens per second</text>',
        f'<path d="M{left} {top}V{top + tall}H390M440 {top + tall}H620" stroke="#444" fill="none"/>',
    ]
    for i in range(5):
        y = top + tall * (1 - i / 4)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{most * i / 4:.2g}</text>')
    step = (390 - left - 40) / max(1, rounds - 1)
    parts += [
        f'<text x="{left + 20 + i * step:.1f}" y="{top + tall + 18}" text-anchor="middle">{i + 1}</text>'
        for i in range(rounds)
    ]
    fastest = max(out[side]["generated_tokens_per_s"] for side in SIDES)
    for number, side in enumerate(SIDES):
        values = out[side]["ttft_p50_by_round_s"]
        points = [(left + 20 + i * step, top + tall * (1 - value / most)) for i, value in enumerate(values)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{COLOURS[side]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[side]}"/>' for x, y in points]
        speed = out[side]["generated_tokens_per_s"]
        bar, x = tall * speed / fastest * 0.92, 465 + number * 80
        parts.append(f'<rect x="{x}" y="{top + tall - bar:.1f}" width="50" height="{bar:.1f}" fill="{COLOURS[side]}"/>')
        parts.append(f'<text x="{x + 25}" y="{top + tall - bar - 6:.1f}" text-anchor="middle">{speed:.1f}</text>')
        name = "vLLM" if side == "stock" else "vLLM + cache"
        parts.append(f'<text x="{x + 25}" y="{top + tall + 18}" text-anchor="middle">{name}</text>')
        parts.append(
            f'<rect x="{left + 150 * number}" y="{height - 40}" width="12" height="12" fill="{COLOURS[side]}"/>'
        )
        parts.append(f'<text x="{left + 150 * number + 18}" y="{height - 30}">{name}</text>')
    work = out["workload"]
    parts.append(
        f'<text x="{left}" y="{height - 8}" fill="#444">{work["users"]} users, histories up to '
        f"{work['last_history_tokens']} tokens, answers of {work['answer_tokens']}; vLLM's KV space holds "
        f"{work['vllm_kv_tokens'] / work['all_histories_tokens']:.0%} of them</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object, with every request's times")
    add("--plot", metavar="FILE.svg", help="also draw it")
    add("--model", help="folder of a model (default: SmolLM2-135M)")
    add("--users", type=int, default=8, help="users, all waiting for an answer all the time (8)")
    add("--rounds", type=int, default=5, help="rounds of every user (5)")
    add("--first", type=int, default=2048, help="tokens of the first prompt (2048)")
    add("--more", type=int, default=48, help="tokens that a user adds in every further round (48)")
    add("--new", type=int, default=16, help="tokens of an answer (16)")
    add("--kv-tokens", type=int, default=4864, help="vLLM's own KV space, in tokens (4864)")
    add("--chunk-tokens", type=int, default=256, help="our chunk (256)")
    add("--block-tokens", type=int, default=128, help="vLLM's block (128)")
    add("--batch-tokens", type=int, default=2560, help="the most tokens that vLLM computes in a step (2560)")
    add("--dram-bytes", default="2GiB", help="our DRAM (2GiB)")
    add("--repeat", type=int, default=1, help="runs of each side, in turns (1)")
    add("--threads", type=int, default=THREADS, help=f"OpenMP threads of both engines ({THREADS})")
    options = parser.parse_args(arguments)
    if min(options.users, options.rounds, options.first, options.more, options.new, options.repeat) < 1:
        parser.error("all sizes and numbers are at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
