"""How fast the control plane decides, and what it weighs, as it grows: a full arena of N chunks under endless new prompts.

python benchmarks/simulate_speed.py            # 100 thousand, 1 million
python benchmarks/simulate_speed.py 10000000   # needs about 2 GiB
"""

from __future__ import annotations

import gc
import os
import sys
import time

from lmcache.control import Index
from lmcache.plan import Chain
from lmcache.simulate.replay import Replay
from lmcache.spec import ALL

PROMPT = 32  # chunks: 16 thousand tokens of 512


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prompt(number: int) -> Chain:
    start = number * PROMPT
    return Chain(b"n" * 32, [i.to_bytes(32, "little") for i in range(start, start + PROMPT)])


def measure(chunks: int, policy: str = "lru") -> None:
    gc.collect()
    before = resident_bytes()
    replay = Replay(Index([("kv", ALL)], 512, [chunks], policy=policy))
    fill = chunks // PROMPT
    for number in range(fill):
        replay.request(prompt(number))
    weight = (resident_bytes() - before) / chunks
    rounds = 2000
    news = [prompt(fill + i) for i in range(rounds)]
    start = time.perf_counter()
    for chain in news:
        replay.request(chain)
    evicting = (time.perf_counter() - start) / (rounds * PROMPT)
    start = time.perf_counter()
    for chain in news:
        replay.request(chain)
    finding = (time.perf_counter() - start) / (rounds * PROMPT)
    print(
        f"{chunks:>10} chunks  {weight:5.0f} bytes per chunk  {1e6 * finding:.2f} µs per chunk found, "
        f"{1e6 * evicting:.2f} µs per chunk stored in place of another",
        flush=True,
    )


if __name__ == "__main__":
    gc.disable()  # nothing here is a cycle; the collector would walk every object again and again
    for size in map(int, sys.argv[1:] or ("100000", "1000000")):
        measure(size)
