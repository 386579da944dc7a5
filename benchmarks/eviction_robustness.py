"""How an eviction policy does against LRU, pattern by pattern: hits on synthetic traces, and on traces of your own.

python benchmarks/eviction_robustness.py                          # all patterns, two lengths, two seeds: ten minutes
python benchmarks/eviction_robustness.py --quick                  # one short trace of each: a minute
python benchmarks/eviction_robustness.py --requests 2000 --seeds 7 13
python benchmarks/eviction_robustness.py --trace mine.jsonl       # a file as well, whole and in variations

Capacities are shares of the distinct blocks. In the table: hit rate of LRU in per cent, and the policy's hits over LRU's.
Both run through the control plane that serves engines. While the constants of `adaptive` were chosen, seeds 1 to 9
were looked at; 11, 13 and 17 were not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from math import exp, log
from typing import NamedTuple

from eviction_rivals import RIVALS
from synthetic_traces import SUITE, Request, Trace, join, phases, sample, shuffle, stack, stretch

from lmcache.control import Index
from lmcache.plan import Chain
from lmcache.simulate.replay import Replay
from lmcache.simulate.trace import read_traces
from lmcache.spec import ALL

PERCENT = (0.2, 1, 2, 5, 10, 20, 40, 60)
TOLERATED = 0.99


class Case(NamedTuple):
    """One trace at one capacity, and leading blocks found by both."""

    name: str
    percent: float
    capacity: int
    blocks: int
    lru: int
    hits: int

    @property
    def ratio(self) -> float:
        """Hits over LRU's."""
        return self.hits / self.lru if self.lru else 1.0


def hits_of(policy: str, trace: Trace, capacity: int) -> int:
    """Leading blocks found, over the whole trace."""
    replay = Replay(Index([("kv", ALL)], 512, [capacity], policy=RIVALS.get(policy, policy)))
    names = {block: digest(block) for request in trace for block in request.blocks}
    return sum(replay.request(Chain(b"n" * 32, [names[block] for block in r.blocks])).dram for r in trace)


def digest(block: int) -> bytes:
    """As evenly spread as real digests are: a policy may draw its sample by them."""
    return (block * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128)).to_bytes(16, "big") * 2


def variations(trace: Trace) -> dict[str, Trace]:
    """A recorded trace, and others that are made of it."""
    half = trace[: len(trace) // 2]
    return {
        "whole": trace,
        "first half": half,
        "second half": trace[len(half) :],
        "first 500": trace[:500],
        "quarter of the conversations": sample(trace, 0.25, 1),
        "half of the conversations": sample(trace, 0.5, 3),
        "ten times slower": stretch(trace, 10.0),
        "shuffled by 200": shuffle(trace, 200, 1),
        "shuffled": shuffle(trace, len(trace), 1),
        "twice": join([trace, trace], apart=False),
        "half, then a stack": phases([half, stack(len(half), 1, depth=100.0)]),
        "a stack, then half": phases([stack(len(half), 1, depth=100.0), half]),
        "a block ahead of all": [r._replace(blocks=[0, *(b + 1 for b in r.blocks)]) for r in trace],
    }


def measure(policy: str, name: str, trace: Trace) -> Iterator[Case]:
    """One case for each capacity."""
    distinct = len({block for request in trace for block in request.blocks})
    accesses = sum(len(request.blocks) for request in trace)
    done = set()
    for percent in PERCENT:
        capacity = max(3, int(distinct * percent / 100))
        if capacity in done:
            continue
        done.add(capacity)
        lru = hits_of("lru", trace, capacity)
        yield Case(name, percent, capacity, accesses, lru, hits_of(policy, trace, capacity))


def row(cases: list[Case]) -> str:
    """A line of the table."""
    found = {case.percent: f"{100 * case.lru / case.blocks:.1f} ×{case.ratio:.3f}" for case in cases}
    return f"| {cases[0].name} | " + " | ".join(found.get(percent, "") for percent in PERCENT) + " |"


def summary(cases: list[Case]) -> str:
    """How many fall short, the mean, and the worst."""
    below = sum(case.ratio < TOLERATED for case in cases)
    some = [case for case in cases if case.lru and case.hits]
    mean = exp(sum(log(case.ratio) for case in some) / max(1, len(some)))
    lines = [f"{len(cases)} cases, {below} below {TOLERATED}; geometric mean {mean:.3f}; the worst:"]
    lines += [
        f"  {case.ratio:.4f}  {case.name}, {case.percent} %: {case.hits} hits, LRU {case.lru}"
        for case in sorted(cases, key=lambda case: case.ratio)[:10]
    ]
    return "\n".join(lines)


def traces(lengths: list[int], seeds: list[int], files: list[str]) -> Iterator[tuple[str, Callable[[], Trace]]]:
    """Name and maker of each."""
    for length in lengths:
        for seed in seeds:
            for name, make in SUITE.items():
                yield f"{name}, {length} requests, seed {seed}", lambda make=make, n=length, s=seed: make(n, s)
    for file in files:
        requests = [Request(r.time, r.tokens, r.output, list(r.blocks)) for r in read_traces([file])]
        for name, trace in variations(requests).items():
            yield f"{file.rsplit('/', 1)[-1]}: {name}", lambda trace=trace: trace


def main() -> int:
    """Print the table; 1 if some case is below `TOLERATED`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--quick", action="store_true", help="--requests 600, and the first seed only")
    parser.add_argument("--requests", type=int, nargs="+", default=[600, 3000], help="lengths of the traces")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--trace", action="append", default=[], metavar="FILE")
    parser.add_argument("--only", default="", help="traces whose name contains this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases: list[Case] = []
    if not options.json:
        print("| trace | " + " | ".join(f"{p} %" for p in PERCENT) + " |\n" + "|---" * (1 + len(PERCENT)) + "|")
    lengths, seeds = ([600], options.seeds[:1]) if options.quick else (options.requests, options.seeds)
    for name, make in traces(lengths, seeds, options.trace):
        if options.only not in name:
            continue
        found = list(measure(options.policy, name, make()))
        cases += found
        if not options.json:
            print(row(found), flush=True)
    if options.json:
        print(json.dumps([{**case._asdict(), "ratio": case.ratio} for case in cases]))
    else:
        print("\n" + summary(cases))
    return int(any(case.ratio < TOLERATED for case in cases))


if __name__ == "__main__":
    sys.exit(main())
