"""vLLM: time to the first token of a prompt never seen, and of one that is in vLLM's own cache, in our DRAM, on our disk.

All hits recompute the same last tokens: a prompt is whole chunks and `TAIL` tokens more. A time is that of one request for
one token, from `add_request` to its token, with nothing else running. Everything that is compared was measured side by side
and the ratios are medians over such pairs, since absolute times on a shared machine are noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from engine_process import (
    THREADS,
    EngineOptions,
    EngineProcess,
    machine,
    model_folder,
    rounded,
    tell,
    temporary_folder,
)

CHUNK = 256
TAIL = 17
"""Prompt tokens that no cache gives: neither vLLM's blocks nor our chunks reach them."""

MIN_SLOTS = 8
"""Chunks for which our DRAM has room, however little it is given."""

_WARM = 3
"""Hits of each kind before any counts: the first calls at a shape are slow."""

EXAMPLES = """\
examples:
  vllm_ttft.py                                  all of it, about 6 minutes on two cores
  vllm_ttft.py --json > ttft.json               one JSON object, progress on standard error
  vllm_ttft.py --tokens 1024 --prompts 4 --rounds 4   a quick look
  vllm_ttft.py --part hits --disk-order native  files in the engine's own order
  vllm_ttft.py --part misses --rounds 48
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    tokens = -(-options.tokens // CHUNK) * CHUNK + TAIL
    out: dict[str, Any] = {}
    with temporary_folder() as folder:
        cache = {
            "chunk_tokens": CHUNK,
            "dram_bytes": options.dram_bytes,
            "disk_path": f"{folder}/hits",
            "disk_bytes": "8GiB",
            "disk_order": options.disk_order,
        }
        common = {
            "model": model_folder(options.model),
            "threads": options.threads,
            "block_tokens": options.block_tokens,
        }
        engine = EngineOptions(
            **common, cache=cache, blocks=(3 * tokens) // options.block_tokens, max_tokens=tokens + options.block_tokens
        )
        if options.part != "misses":
            out |= hits(engine, tokens, options.prompts, options.repeat)
        if options.part != "hits":
            out |= misses(common, cache, Path(folder), options)
    out["machine"] = machine()
    text = json.dumps(rounded(out)) if options.json else _shown(out)
    print(text)


# ---------------------------------------------------------------- hits


def hits(options: EngineOptions, tokens: int, prompts: int, repeat: int) -> dict[str, Any]:
    """Two engines after each other over one folder: the first computes, the second finds its files.

    The second has memory for all prompts but one, and goes round: every hit comes from its file. The first ones go to
    memory that was never touched, as after a restart, later ones to memory that held another prompt before.
    """
    kinds = ("cold", "native", "dram", "disk", "native_after_disk", "disk_reused", "native_after_disk_reused")
    raw: dict[str, list[float]] = {kind: [] for kind in kinds}
    timed = [f"prompt {i}" for i in range(prompts)]
    cached = tokens - TAIL

    def first_token(engine: EngineProcess, expected: int, seed: str, reset: bool = False) -> float:
        answer = engine.ask("one", seed=seed, tokens=tokens, reset=reset)
        _expect(answer["cached"], expected, seed)
        return float(answer["first_s"])

    def warm_up(engine: EngineProcess, *seeds: str) -> None:
        for seed in seeds:
            tell(f"warming up: {first_token(engine, 0, seed):.2f} s")
            for _ in range(_WARM):
                first_token(engine, cached, seed)
                first_token(engine, cached, seed, reset=True)

    with EngineProcess(options, "first engine") as engine:
        warm_up(engine, "warm 0", "warm 1")
        for seed in timed:
            raw["cold"].append(first_token(engine, 0, seed))
            for i in range(repeat):
                first_token(engine, cached, seed)  # so that both kinds follow a request with the same tail
                for kind in ("native", "dram")[:: 1 if i % 2 else -1]:
                    raw[kind].append(first_token(engine, cached, seed, reset=kind == "dram"))
            tell(f"{seed}: cold {raw['cold'][-1]:.2f}  native {raw['native'][-1]:.4f}  dram {raw['dram'][-1]:.4f}")
        nbytes = _moved(engine, "dram", "engine") // (repeat * prompts + 2 * _WARM)
        copy = engine.ask("memcpy", nbytes=nbytes)
        facts = engine.facts
    room = prompts - 1
    # In LRU's order, whatever the default policy is: only then is a prompt gone by the time its turn comes again.
    small = replace(options, cache={**(options.cache or {}), "dram_bytes": room * nbytes, "policy": "lru"})
    with EngineProcess(small, "second engine") as engine:
        warm_up(engine, "warm 2")
        first_token(engine, cached, "warm 0")  # from its file
        used = 2
        for turn in range(1 + -(-repeat // 2)):
            for seed in timed:
                fresh = used < room
                if turn and fresh:
                    raise RuntimeError("memory for all prompts but one was not used up by all of them")
                used += 1
                kind = "disk" if fresh else "disk_reused"
                raw[kind].append(first_token(engine, cached, seed, reset=True))
                raw[f"native_after_{kind}"].append(first_token(engine, cached, seed))
            tell(f"turn {turn}: disk {raw['disk'][-1]:.4f}, memory used before {raw['disk_reused'][-1]:.4f}")
        files = nbytes * (used - 1)
        if not files <= _moved(engine, "disk", "dram") < 1.01 * files:  # files have headers
            raise RuntimeError(f"{_moved(engine, 'disk', 'dram')} bytes came from disk, {files} were expected")
    return {
        "cold_s": median(raw["cold"]),
        "native_hit_s": median(raw["native"]),
        "dram_hit_s": median(raw["dram"]),
        "disk_hit_s": median(raw["disk"]),
        "disk_hit_reused_s": median(raw["disk_reused"]),
        "dram_ratio": _paired(raw["dram"], raw["native"]),
        "disk_ratio": _paired(raw["disk"], raw["native_after_disk"]),
        "disk_reused_ratio": _paired(raw["disk_reused"], raw["native_after_disk_reused"]),
        "prompt_tokens": tokens,
        "recomputed_tokens": {"cold": tokens, "native": TAIL, "dram": TAIL, "disk": TAIL},
        "kv_bytes": nbytes,
        "memcpy_gbs": copy,
        "memcpy_s": nbytes / copy / 1e9,
        "raw_s": raw,
        "engine": facts,
        "cache": {key: value for key, value in (options.cache or {}).items() if key != "disk_path"},
    }


def _expect(found: int, expected: int, seed: str) -> None:
    if found != expected:
        raise RuntimeError(f"{seed}: {found} tokens came from a cache, {expected} were expected")


def _moved(engine: EngineProcess, source: str, target: str) -> int:
    counters: dict[str, float] = engine.ask("counters")
    return int(counters.get(f'lmcache_moved_bytes_total{{src="{source}",dst="{target}"}}', 0))


# ---------------------------------------------------------------- misses


def misses(common: dict[str, Any], cache: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Engines that take turns, A B C, C B A, …: stock, with memory, with memory and disk. Every prompt is new."""
    length = options.miss_tokens
    caches: dict[str, dict[str, Any] | None] = {
        "stock": None,
        "dram": {name: value for name, value in cache.items() if not name.startswith("disk_")},
        "disk": {**cache, "disk_path": str(folder / "misses")},
    }
    blocks = 3 * options.miss_batch * (length + options.miss_new) // options.block_tokens + 8
    engines: dict[str, EngineProcess] = {}
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    drained: dict[str, list[float]] = {name: [] for name in caches}
    try:
        for name, settings in caches.items():
            engine = EngineOptions(
                **common, cache=settings, blocks=blocks, max_tokens=length + options.miss_new + CHUNK
            )
            engines[name] = EngineProcess(engine, f"misses, {name}")
        for turn in range(-2, options.rounds):
            for name in list(caches)[:: 1 if turn % 2 else -1]:
                seeds = [f"{turn} {i}" for i in range(options.miss_batch)]
                answer = engines[name].ask("batch", seeds=seeds, tokens=length, new=options.miss_new)
                _expect(answer["cached"], 0, f"misses, {name}, round {turn}")
                _expect(answer["tokens"], options.miss_batch * options.miss_new, f"misses, {name}: generated tokens")
                if turn >= 0:
                    seconds[name].append(answer["seconds"])
                    drained[name].append(answer["drained_s"])
            if turn >= 0:
                tell(
                    f"misses {turn + 1}/{options.rounds}: " + "  ".join(f"{n} {s[-1]:.3f}" for n, s in drained.items())
                )
    finally:
        for engine in engines.values():
            engine.close()
    total = options.miss_batch * (length + options.miss_new)
    return {
        "miss_throughput_ratio": _paired(drained["stock"], drained["disk"]),
        "miss_throughput_quartiles": _quartiles(drained["stock"], drained["disk"]),
        "miss_throughput_ratio_dram": _paired(drained["stock"], drained["dram"]),
        "miss_throughput_quartiles_dram": _quartiles(drained["stock"], drained["dram"]),
        "miss": {
            "prompt_tokens": length,
            "new_tokens": options.miss_new,
            "requests_a_round": options.miss_batch,
            "rounds": options.rounds,
            "tokens_per_s": {name: total / median(found) for name, found in drained.items()},
            "raw_s": seconds,
            "raw_with_writes_s": drained,
        },
    }


# ---------------------------------------------------------------- figures


def _paired(upper: Sequence[float], lower: Sequence[float]) -> float:
    return median(a / b for a, b in zip(upper, lower, strict=True))


def _quartiles(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    ratios = [a / b for a, b in zip(upper, lower, strict=True)]
    if len(ratios) < 2:
        return [ratios[0], ratios[0]]
    first, _, third = quantiles(ratios, n=4, method="inclusive")
    return [first, third]


def _shown(out: dict[str, Any]) -> str:
    lines: list[str] = []
    if "cold_s" in out:
        lines += [
            f"prompt of {out['prompt_tokens']} tokens, {out['kv_bytes'] / 1e6:.0f} MB of KV; every hit recomputes {TAIL} tokens",
            f"cold          {out['cold_s'] * 1e3:8.1f} ms",
            f"vLLM's cache  {out['native_hit_s'] * 1e3:8.1f} ms",
            f"our DRAM      {out['dram_hit_s'] * 1e3:8.1f} ms   {out['dram_ratio']:.2f} x vLLM's",
            f"our disk      {out['disk_hit_s'] * 1e3:8.1f} ms   {out['disk_ratio']:.2f} x vLLM's, into fresh memory",
            f"              {out['disk_hit_reused_s'] * 1e3:8.1f} ms   {out['disk_reused_ratio']:.2f} x vLLM's, into used memory",
            f"one memcpy    {out['memcpy_s'] * 1e3:8.1f} ms   {out['memcpy_gbs']:.1f} GB/s",
        ]
    if "miss" in out:
        for key, name in (("", "DRAM and disk"), ("_dram", "DRAM only")):
            low, high = out[f"miss_throughput_quartiles{key}"]
            ratio = out[f"miss_throughput_ratio{key}"]
            lines.append(f"misses, {name}: {ratio:.3f} of stock vLLM's throughput (quartiles {low:.3f}, {high:.3f})")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object, with every single time")
    add("--part", choices=("all", "hits", "misses"), default="all", help="what to measure (all)")
    add("--model", help="folder of a model (default: SmolLM2-135M)")
    add("--tokens", type=int, default=4096, help=f"prompt, rounded up to chunks of {CHUNK}, and {TAIL} more (4096)")
    add("--prompts", type=int, default=6, help="prompts computed cold and read from disk (6)")
    add("--repeat", type=int, default=8, help="native and DRAM hits of each prompt (8)")
    add("--rounds", type=int, default=24, help="paired rounds of prompts never seen (24)")
    add("--miss-tokens", type=int, default=1024, help="prompt of those rounds (1024)")
    add("--miss-new", type=int, default=32, help="tokens generated there (32)")
    add("--miss-batch", type=int, default=2, help="requests at once there (2)")
    add("--block-tokens", type=int, default=128, help="vLLM's block (128)")
    add("--dram-bytes", default="2GiB", help="our DRAM (2GiB)")
    add("--disk-order", choices=("canonical", "native"), default="canonical", help="byte order of files (canonical)")
    add("--threads", type=int, default=THREADS, help=f"OpenMP threads of every engine ({THREADS})")
    options = parser.parse_args(arguments)
    if (
        min(
            options.tokens, options.prompts - 3, options.repeat, options.miss_tokens, options.miss_batch, options.rounds
        )
        < 1
    ):
        parser.error("sizes and numbers of repetitions are at least 1, --prompts at least 4")
    chunks = -(-options.tokens // CHUNK) * (options.prompts - 1)
    if options.part != "misses" and chunks < MIN_SLOTS:
        parser.error(
            f"all prompts but one have {chunks} chunks, and DRAM holds at least {MIN_SLOTS}: none would come from disk a second "
            "time; give more --tokens or --prompts"
        )
    if CHUNK % options.block_tokens:
        parser.error(f"--block-tokens {options.block_tokens}: give a divisor of {CHUNK}, or the tails would differ")
    return options


if __name__ == "__main__":
    sys.exit(main())
