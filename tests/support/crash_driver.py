"""Kills a storing process with SIGKILL again and again, and checks what a restart finds. Run as a script by test_crash.

Everything is forked from one process that has imported torch but never started a thread, so that a round costs a fraction of
a second. A neighbour stores and reads on the same folder throughout.

    python crash_driver.py FOLDER ROUNDS SEED
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from lmcache import CacheEngine
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

CHUNKS = 6


def prompt(number: int) -> torch.Tensor:
    return torch.randint(0, 50_000, (CHUNKS * CHUNK,), generator=torch.Generator().manual_seed(number))


def pool_of(number: int) -> Pool:
    return Pool("packed", 32, seed=number)


def slots_of(pool: Pool) -> torch.Tensor:
    return scattered(CHUNKS * CHUNK, pool, seed=5)


def engine_at(folder: str) -> CacheEngine:
    return CacheEngine(tiny_config(disk_path=folder, disk_bytes="20GiB"), tiny_spec())


def check(engine: CacheEngine, number: int, at_least: int = 0) -> None:
    """What is served for this prompt is what was stored, and at least `at_least` tokens of it are there."""
    truth, target = pool_of(number), Pool("packed", 32, seed=999)
    slots = slots_of(target)
    with engine.lookup(prompt(number)) as hit:
        found = hit.tokens
        loaded = engine.retrieve(hit, target.kv, slots)
    assert loaded >= at_least, f"prompt {number}: {loaded} tokens loaded of {found} found, {at_least} were flushed"
    assert target.sequence(slots[:loaded]) == truth.sequence(slots[:loaded]), f"prompt {number}: wrong bits"


def store_until_killed(folder: str, first: int, said: int) -> None:
    """Store prompts first, first + 1, …; after each flush, say so: one byte a prompt."""
    with engine_at(folder) as engine:
        for number in range(first, first + 200):
            pool = pool_of(number)
            engine.store(prompt(number), pool.kv, slots_of(pool))
            if number % 2:
                assert engine.flush()
                os.write(said, b"..")


def neighbour(folder: str) -> None:
    """Another process on the folder: stores and reads its own prompts for as long as it lives."""
    with engine_at(folder) as engine:
        for number in range(1_000_000, 2_000_000):
            pool = pool_of(number)
            engine.store(prompt(number), pool.kv, slots_of(pool))
            engine.flush()
            check(engine, number - number % 7 if number % 7 < number - 1_000_000 else number)
            time.sleep(0.05)


def verify(folder: str, flushed: list[int], torn: range) -> None:
    with engine_at(folder) as engine:
        for number in flushed:
            check(engine, number, CHUNKS * CHUNK)
        for number in torn:
            check(engine, number)
        stats = engine.stats()
        corrupt = [name for name, value in stats.items() if "corruptions" in name and value]
        assert not corrupt, f"a killed writer left damaged files: {corrupt}"


def fork(what: Callable[..., None], *args: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        what(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    folder, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    torch.set_num_threads(1)
    beside = fork(neighbour, folder)
    try:
        kept = rounds_of(folder, rounds, chance, beside)
    finally:
        os.kill(beside, signal.SIGKILL)
        os.waitpid(beside, 0)
    print(f"{rounds} kills, {kept} flushed prompts, all there")


def rounds_of(folder: str, rounds: int, chance: random.Random, beside: int) -> int:
    kept: list[int] = []
    for round_ in range(rounds):
        heard, said = os.pipe()
        first = round_ * 200
        pid = fork(store_until_killed, folder, first, said)
        os.close(said)
        while not os.read(heard, 2):  # it has begun
            pass
        time.sleep(chance.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        flushed = 2
        while more := os.read(heard, 4096):
            flushed += len(more)
        os.close(heard)
        assert flushed < 200, "the child ended before it was killed"
        kept += range(first, first + flushed)
        sample = [*range(first, first + flushed), *chance.sample(kept, min(len(kept), 3))]
        checker = fork(verify, folder, sample, range(first + flushed, first + flushed + 3))
        _, status = os.waitpid(checker, 0)
        assert status == 0, f"round {round_}: the restart found wrong or lost objects"
        state = os.waitid(os.P_PID, beside, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert state is None, f"round {round_}: the neighbour died: {state}"
    return len(kept)


if __name__ == "__main__":
    main()
