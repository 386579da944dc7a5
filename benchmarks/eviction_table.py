"""Every eviction policy on recorded traces: hit rate over capacity, and what a chunk costs against LRU.

python benchmarks/eviction_table.py conversation_trace.jsonl agent_trace.jsonl
python benchmarks/eviction_table.py trace.jsonl --policy lru adaptive --percent 5 --json
python benchmarks/eviction_table.py trace.jsonl --rivals    # also the policies of eviction_rivals.py

Capacities are per cent of the distinct chunks of a trace. Hit rate: chunks found, as part of the longest leading stretch of their
prompt, of all chunks asked for, in per cent. Cost: CPU time per chunk asked for over that of `lru`, at the same capacity,
the least of `--repeat` runs of each in turn. All run through the control plane that serves engines.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from eviction_rivals import RIVALS

from lmcache.control import Index
from lmcache.control.eviction import POLICIES
from lmcache.plan import Chain
from lmcache.simulate.replay import Replay
from lmcache.simulate.run import BOUNDS
from lmcache.simulate.trace import Trace, read_traces
from lmcache.spec import ALL

PERCENT = (1.0, 2.0, 5.0, 10.0, 20.0)


class Cell(NamedTuple):
    """One policy on one trace at one capacity. Bounds are no policies of the cache, and have no cost."""

    trace: str
    policy: str
    percent: float
    capacity: int
    hit_rate: float
    us_per_chunk: float | None
    cost: float | None


def chains_of(trace: Trace) -> list[Chain]:
    """The requests as an index takes them."""
    names = [block.to_bytes(32, "little") for block in range(trace.blocks)]
    return [Chain(b"n" * 32, [names[block] for block in request.blocks]) for request in trace]


def replay(policy: str, chains: list[Chain], tokens: int, capacity: int) -> tuple[int, float]:
    """Leading chunks found, and seconds of CPU time."""
    index = Replay(Index([("kv", ALL)], tokens, [capacity], policy=RIVALS.get(policy, policy)))
    gc.collect()
    started = time.process_time()
    hits = sum(index.request(chain).dram for chain in chains)
    return hits, time.process_time() - started


def measure(path: str, policies: list[str], percents: list[float], repeat: int) -> list[Cell]:
    """The cells of one trace."""
    trace = read_traces([path])
    chains, total, name = chains_of(trace), trace.accesses, Path(path).stem
    cells: list[Cell] = []
    for percent in percents:
        capacity = max(1, int(trace.blocks * percent / 100))
        best: dict[str, tuple[int, float]] = {}
        for _ in range(repeat):
            for policy in dict.fromkeys(["lru", *policies]):
                if policy not in BOUNDS:
                    hits, seconds = replay(policy, chains, trace.chunk_tokens, capacity)
                    best[policy] = hits, min(seconds, best.get(policy, (0, seconds))[1])
        for policy in policies:
            if policy in BOUNDS:
                hits = sum(BOUNDS[policy](trace, capacity))
                cells.append(Cell(name, policy, percent, capacity, hits / total, None, None))
            else:
                hits, seconds = best[policy]
                cost = seconds / max(best["lru"][1], 1e-9)
                cells.append(Cell(name, policy, percent, capacity, hits / total, 1e6 * seconds / total, cost))
    return cells


def table(cells: list[Cell]) -> str:
    """One trace, as Markdown: hit rate in per cent and, in brackets, cost over LRU's."""
    percents = list(dict.fromkeys(cell.percent for cell in cells))
    lines = [
        f"| {cells[0].trace} | " + " | ".join(f"{p:g} %" for p in percents) + " |",
        "|---" * (1 + len(percents)) + "|",
    ]
    for policy in dict.fromkeys(cell.policy for cell in cells):
        row = [cell for cell in cells if cell.policy == policy]
        texts = [f"{100 * c.hit_rate:.2f}" + ("" if c.cost is None else f" (×{c.cost:.2f})") for c in row]
        lines.append(f"| {policy} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table of each trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", metavar="FILE")
    known = [*POLICIES, *RIVALS, *BOUNDS]
    parser.add_argument("--policy", nargs="+", choices=known)
    parser.add_argument(
        "--rivals", action="store_true", help="without --policy: include the policies of eviction_rivals.py"
    )
    parser.add_argument("--percent", nargs="+", type=float, default=list(PERCENT))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each policy, of which the fastest counts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    policies = options.policy or [p for p in known if p != "infinite" and (options.rivals or p not in RIVALS)]
    found: list[Cell] = []
    for path in options.traces:
        cells = measure(path, policies, options.percent, options.repeat)
        found += cells
        if not options.json:
            print(table(cells) + "\n", flush=True)
    if options.json:
        print(json.dumps([cell._asdict() for cell in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
