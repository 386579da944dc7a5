"""Engines opened before a fork and used in the child: gunicorn --preload, multiprocessing's fork, torch's DataLoader."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache import CacheEngine
from lmcache.control.namespaces import Namespaces
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

SPEC = tiny_spec()
POOL = Pool("packed", 40, seed=1)
SLOTS = scattered(2 * CHUNK, POOL)
TIMEOUT_S = 60


def tokens(n: int) -> torch.Tensor:
    return torch.arange(2 * CHUNK) + 1000 * n


def in_child(call: Callable[[], object]) -> Any:
    """Returns what `call` returns in a forked child."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(call()))
    process.start()
    try:
        assert ours.poll(TIMEOUT_S), "the child hangs"
        answer = ours.recv()
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
        return answer
    finally:
        process.kill()


def serve(engine: CacheEngine, n: int) -> int:
    """Returns how many tokens are loaded, all of them right."""
    out = Pool("packed", 40)
    with engine.lookup(tokens(n)) as hit:
        loaded = engine.retrieve(hit, out.kv, SLOTS)
    assert out.sequence(SLOTS[:loaded]) == POOL.sequence(SLOTS[:loaded])
    return loaded


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    config = tiny_config(disk_path=tmp_path / "kv", disk_bytes="64MiB", dram_bytes="1MiB")
    with CacheEngine(config, SPEC) as engine:
        engine.set_weights_version(7)
        for n in range(3):
            engine.store(tokens(n), POOL.kv, SLOTS)
        assert engine.flush()
        yield engine


def test_a_child_loads_and_writes_beside_its_parent(engine: CacheEngine, caplog: pytest.LogCaptureFixture) -> None:
    def child() -> object:
        loaded = [serve(engine, n) for n in (0, 1, 9)]
        stored = engine.store(tokens(5), POOL.kv, SLOTS)
        said = [record.getMessage() for record in caplog.records if "cache-forked" in record.getMessage()]
        return loaded, stored, bool(engine.flush()), len(said)

    assert in_child(child) == ([2 * CHUNK, 2 * CHUNK, 0], 2 * CHUNK, True, 1)
    assert serve(engine, 5) == 2 * CHUNK, "what the child has written"
    assert serve(engine, 0) == 2 * CHUNK
    assert engine.store(tokens(6), POOL.kv, SLOTS) == 2 * CHUNK
    assert engine.flush()


def test_a_fork_while_other_threads_use_the_cache(engine: CacheEngine) -> None:
    stop = threading.Event()

    def work(first: int) -> None:
        while not stop.is_set():
            engine.store(tokens(first), POOL.kv, SLOTS)
            serve(engine, first)

    threads = [threading.Thread(target=work, args=(n,)) for n in (20, 21)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert in_child(lambda: serve(engine, 1)) == 2 * CHUNK
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_hit_from_before_the_fork_loads_nothing(engine: CacheEngine) -> None:
    out = Pool("packed", 40)
    blank = out.snapshot()

    def child() -> object:
        engine.prefetch(hit)
        loaded = engine.retrieve(hit, out.kv, SLOTS)
        hit.release()
        return loaded, all(map(torch.equal, blank, out.snapshot())), serve(engine, 0)

    with engine.lookup(tokens(0)) as hit:
        assert hit.tokens == 2 * CHUNK
        assert in_child(child) == (0, True, 2 * CHUNK)
        assert engine.retrieve(hit, out.kv, SLOTS) == 2 * CHUNK


def test_no_thread_of_a_child_sees_names_of_earlier_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(disk_path=tmp_path / "kv", disk_bytes="64MiB", dram_bytes="1MiB")
    change = Namespaces.set_weights_version

    def child() -> object:
        found: list[int] = []
        reader = threading.Thread(target=lambda: found.append(serve(engine, 0)))

        def changes_late(names: Namespaces, version: str) -> None:
            reader.start()
            reader.join(1.0)
            change(names, version)

        monkeypatch.setattr(Namespaces, "set_weights_version", changes_late)
        found.append(serve(engine, 1))
        reader.join(TIMEOUT_S)
        return found

    with CacheEngine(config, SPEC) as engine:
        engine.store(tokens(0), POOL.kv, SLOTS)
        engine.flush()
        engine.set_weights_version(7)
        assert in_child(child) == [0, 0]


def test_a_child_that_does_not_use_the_cache_closes_nothing_of_its_parent(engine: CacheEngine) -> None:
    def child() -> object:
        engine.close()
        return serve(engine, 0), engine.store(tokens(8), POOL.kv, SLOTS)

    in_child(child)
    assert serve(engine, 0) == 2 * CHUNK
