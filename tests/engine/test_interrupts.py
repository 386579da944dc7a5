"""Ctrl-C at any moment of a cache call: the process goes on, and so does the cache."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType

import pytest
import torch

from lmcache import CacheEngine
from lmcache.driver import Driver
from lmcache_conformance.labs.faulty_tier import FaultyTier
from lmcache_conformance.labs.interrupts import ctrl_c_raises, interrupted_at
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

SPEC = tiny_spec()
POOL = Pool("packed", 40, seed=1)
SLOTS = scattered(2 * CHUNK, POOL)
STEP = 7
"""Every how many moments an interrupt is tried."""


def tokens(n: int) -> torch.Tensor:
    return torch.arange(2 * CHUNK) + 1000 * n


def serve(engine: CacheEngine, n: int, out: Pool) -> int:
    with engine.lookup(tokens(n)) as hit:
        loaded = engine.retrieve(hit, out.kv, SLOTS)
    engine.store(tokens(n), POOL.kv, SLOTS)
    return loaded


@pytest.fixture
def engine() -> CacheEngine:
    # Two prompts fill the arena, so that one slot that is never freed makes a later store incomplete.
    config = tiny_config(dram_bytes=8 * SPEC.object_bytes(0, CHUNK), lease_s=4.0, policy="lru")
    return CacheEngine(config, SPEC)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt in a finaliser is ignored
def test_an_interrupt_at_any_moment_leaves_a_whole_cache(engine: CacheEngine) -> None:
    out = Pool("packed", 40)
    for n in range(6):
        serve(engine, n, out)  # evictions, as well
    moment, n = 1, 0
    while interrupted_at(moment, lambda: serve(engine, n % 6, out)):  # noqa: B023
        moment, n = moment + STEP, n + 1
        engine._plane.check()
    assert moment > 50 * STEP, "the cache was hardly interrupted"
    time.sleep(4.1)  # a hit that was lost on the way to its caller is leased until `lease_s` has passed
    for n in range(100, 106):
        assert engine.store(tokens(n), POOL.kv, SLOTS) == 2 * CHUNK
        assert serve(engine, n, out) == 2 * CHUNK
        assert out.sequence(SLOTS) == POOL.sequence(SLOTS)
    states = {k: v for k, v in engine.stats().items() if "arena_slots" in k and v}
    assert sum(v for k, v in states.items() if "ready" not in k) == 0, states
    engine.close()


def interrupt_main_in(code: CodeType) -> None:
    """Sends SIGINT once the main thread runs this code."""
    main = threading.main_thread().ident
    while True:
        frame = sys._current_frames().get(main or 0)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if frame is not None:
            return signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.parametrize("call", ["lookup", "retrieve", "flush", "close"])
def test_an_interrupt_ends_a_wait_for_a_tier_that_hangs(call: str) -> None:
    out = Pool("packed", 40)
    tier = FaultyTier(shared=True)
    with CacheEngine(tiny_config(), SPEC, tiers=[tier]) as writer:
        writer.store(tokens(0), POOL.kv, SLOTS)
        writer.flush()
    engine = CacheEngine(tiny_config(probe_timeout_s=60, load_timeout_s=60), SPEC, tiers=[tier])
    try:
        hit = engine.lookup(tokens(0)) if call == "retrieve" else None
        tier.answers.clear()
        if call in ("flush", "close"):
            engine.store(tokens(2), POOL.kv, SLOTS)
        blank = out.snapshot()
        interrupter = threading.Thread(target=interrupt_main_in, args=(Driver._wait.__code__,), daemon=True)
        calls: dict[str, Callable[[], object]] = {
            "lookup": lambda: engine.lookup(tokens(0)),
            "retrieve": lambda: hit and engine.retrieve(hit, out.kv, SLOTS),
            "flush": engine.flush,
            "close": engine.close,
        }
        with ctrl_c_raises():
            interrupter.start()
            with pytest.raises(KeyboardInterrupt):
                calls[call]()
        tier.answers.set()
        if hit is not None:
            hit.release()
            time.sleep(0.2)
            assert all(map(torch.equal, blank, out.snapshot())), "a load that was given up writes no engine memory"
        if call != "close":
            engine.flush()
            assert serve(engine, 0, out) == 2 * CHUNK
            assert out.sequence(SLOTS) == POOL.sequence(SLOTS)
            assert engine.stats()["index_leases"] == 0
    finally:
        tier.answers.set()
        engine.close()
