"""A day of a billion prompt tokens through the control plane: what it finds, what it writes to disk, what it costs itself.

python benchmarks/billion_tokens.py                          # some minutes, under a gigabyte
python benchmarks/billion_tokens.py --admit all --disk 32TiB
python benchmarks/billion_tokens.py --tokens 1e7 --json      # a hundredth of the traffic, of the memory, of the disk

The traffic is made up as it is needed, from a seed: conversations with pauses to think, questions about documents of which few
are popular, agents that grow their context by the step, and prompts nobody sends twice; more by day than by night.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import resource
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, count
from random import Random

from lmcache.config.settings import parse_size
from lmcache.control import Index, TierInfo
from lmcache.control.admission.rules import Adaptive, SecondHit
from lmcache.plan import Chain, Name
from lmcache.simulate.replay import Replay
from lmcache.simulate.run import Disk
from lmcache.spec import ALL

CHUNK_TOKENS = 256
KV_BYTES = 131_072
"""Per token: Llama 3 8B in 16 bits."""
DAY = 86_400.0
RULES = ("all", "second", "adaptive")
KINDS = {"chat": 0.45, "document": 0.30, "agent": 0.01, "once": 0.24}
"""Shares of what begins."""

Prompt = list[int]


class Day:
    """Prompts in order of time, as lists of chunk numbers; equal numbers, equal prefixes."""

    def __init__(self, starts_per_s: float, seed: int) -> None:
        self._rate = starts_per_s
        self._random = Random(seed)
        self._fresh = count()
        self._tie = count()
        self._systems = [self._new(self._random.randint(2, 12)) for _ in range(8)]
        documents = max(20, round(400 * starts_per_s * DAY / 50_000))
        self._documents = [self._new(self._random.randint(8, 80)) for _ in range(documents)]
        self._popular = list(accumulate(1 / rank for rank in range(1, documents + 1)))

    def __iter__(self) -> Iterator[tuple[float, str, Prompt]]:
        due: list[tuple[float, int, str, Prompt]] = [(0.0, next(self._tie), "start", [])]
        while due:
            now, _, kind, context = heapq.heappop(due)
            if now >= DAY:
                return
            if kind == "start":
                busy = 1 - 0.6 * math.cos(2 * math.pi * now / DAY)  # midnight to midnight
                heapq.heappush(due, (now + self._random.expovariate(self._rate * busy), next(self._tie), "start", []))
                kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
            prompt, pause = self._next(kind, context)
            yield now, kind, prompt
            if pause is not None:
                heapq.heappush(due, (now + pause, next(self._tie), kind, prompt))

    def _next(self, kind: str, context: Prompt) -> tuple[Prompt, float | None]:
        """A prompt that goes on from `context`, and the pause until the next one, if there is one."""
        random = self._random
        if kind == "document":
            at = bisect(self._popular, random.random() * self._popular[-1], hi=len(self._popular) - 1)
            return self._documents[at] + self._new(1), None
        if kind == "once":
            return self._new(random.randint(4, 60)), None
        before = context or random.choice(self._systems)
        if kind == "chat":
            prompt = before + self._new(1 + int(random.expovariate(1 / (3 if context else 10))))
            return prompt, random.lognormvariate(4.8, 1.0) if random.random() < 0.6 else None
        prompt = before + self._new(random.randint(1, 6))
        return prompt, random.expovariate(1 / 8) if random.random() < 0.97 else None

    def _new(self, chunks: int) -> Prompt:
        return [next(self._fresh) for _ in range(chunks)]


def starts_for(tokens: float, seed: int) -> float:
    """How many must begin per second for so many tokens a day."""
    few = 0.05
    sample = sum(len(prompt) for _, _, prompt in Day(few, seed)) * CHUNK_TOKENS
    return few * tokens / sample


def run(tokens: float, seed: int, dram: int, disk: int, admit: str) -> dict[str, object]:
    """One day."""
    written: Counter[str] = Counter()
    names = Disk(disk, lambda name: replay.lost(0, name))

    def write(tier: int, name: Name) -> None:
        written["chunks"] += 1
        names.put(name)

    rule = {
        "all": lambda: None,
        "second": lambda: SecondHit(names.has_room, {0: disk}),
        "adaptive": lambda: Adaptive(names.has_room, {0: disk}),
    }[admit]()
    index = Index([("kv", ALL)], CHUNK_TOKENS, [dram], tiers=[TierInfo("disk")], admit=rule)
    replay = Replay(index, written=write, used=lambda tier, name: names.use(name))
    asked = requests = 0
    hits: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    namespace = b"n" * 32
    rate = starts_for(tokens, seed)
    started = time.perf_counter()
    for _, kind, prompt in Day(rate, seed):
        found = replay.request(Chain(namespace, [i.to_bytes(32, "little") for i in prompt]))
        requests += 1
        asked += len(prompt)
        traffic[kind] += len(prompt)
        hits["dram"] += found.dram
        hits["disk"] += found.tiers.get(0, 0)
    wall = time.perf_counter() - started
    size = CHUNK_TOKENS * KV_BYTES
    return {
        "admit": admit,
        "tokens": asked * CHUNK_TOKENS,
        "requests": requests,
        "chunks": asked,
        "share_of_traffic": {kind: round(n / asked, 3) for kind, n in traffic.items()},
        "dram_chunks": dram,
        "disk_chunks": disk,
        "hit_rate": sum(hits.values()) / asked,
        "hit_rate_dram": hits["dram"] / asked,
        "hit_rate_disk": hits["disk"] / asked,
        "disk_written_chunks": written["chunks"],
        "disk_written_bytes": written["chunks"] * size,
        "disk_writes_per_day": written["chunks"] / disk,
        "wall_s": wall,
        "chunks_per_s": asked / wall,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e9, help="prompt tokens a day, about (default 1e9)")
    parser.add_argument("--dram", default="1TiB", help="for a billion tokens; in proportion for others")
    parser.add_argument("--disk", default="8TiB", help="likewise")
    parser.add_argument("--admit", choices=RULES, default="adaptive", help="what goes to a full disk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    chunks = [
        max(1, int(parse_size(text) * given.tokens / 1e9) // (CHUNK_TOKENS * KV_BYTES))
        for text in (given.dram, given.disk)
    ]
    result = run(given.tokens, given.seed, chunks[0], chunks[1], given.admit)
    if given.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>20}  {f'{value:.4g}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
