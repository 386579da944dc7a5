"""A clear by another process on the same folder: what it promises about memory and about writes under way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache import CacheEngine
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec

TOKENS = 4 * CHUNK
PROMPT = torch.arange(TOKENS)

_OTHER = """
import sys, torch
from lmcache import CacheEngine
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec
pool = Pool("packed", 32, seed=1)
with CacheEngine(tiny_config(disk_path=sys.argv[1]), tiny_spec()) as engine:
    print("ready", flush=True)
    for line in sys.stdin:
        salt = line.strip()
        if salt:  # it knows the tenants that it has served
            engine.store(torch.arange(CHUNK), pool.kv, scattered(CHUNK, pool), salt=salt)
        print(engine.clear(salt or None), flush=True)
"""


class Other:
    """Another process with an engine on the folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", _OTHER, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def clear(self, salt: str = "") -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(salt + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cleared")


@pytest.fixture(scope="module")
def other(folder: Path) -> Iterator[Other]:
    process = Other(folder)
    yield process
    process.close()


@pytest.fixture
def engine(folder: Path, other: Other) -> Iterator[CacheEngine]:
    other.clear()
    with CacheEngine(tiny_config(disk_path=folder), tiny_spec()) as opened:
        yield opened


def store(engine: CacheEngine, salt: str = "") -> int:
    pool = Pool("packed", 32, seed=1)
    return engine.store(PROMPT, pool.kv, scattered(TOKENS, pool), salt=salt)


def found(engine: CacheEngine, salt: str = "") -> int:
    with engine.lookup(PROMPT, salt=salt) as hit:
        return hit.tokens


def on_disk(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))


def becomes(value: int, engine: CacheEngine, salt: str = "") -> None:
    until = time.monotonic() + 20
    while found(engine, salt) != value:
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


def test_another_processs_clear_of_a_tenant_reaches_memory_here(
    folder: Path, other: Other, engine: CacheEngine
) -> None:
    assert store(engine, "a") == store(engine, "b") == TOKENS
    assert engine.flush()
    other.clear("a")
    becomes(0, engine, "a")
    assert found(engine, "b") == TOKENS
    assert on_disk(folder) == 4
    assert engine.flush(), "they were written before"
    assert store(engine, "a") == TOKENS, "it is stored anew, for it is not believed to be there"
    assert engine.flush()
    assert on_disk(folder) == 8


def test_what_another_process_cleared_is_not_served_from_a_belief(
    folder: Path, other: Other, engine: CacheEngine
) -> None:
    assert store(engine) == TOKENS
    assert engine.flush()
    assert other.clear() == 4
    becomes(0, engine)
    assert on_disk(folder) == 0


def test_what_was_gathered_before_a_clear_and_is_being_written_does_not_appear_after_it(
    folder: Path, other: Other, engine: CacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cleared, pwritev = threading.Event(), threading.Event(), os.pwritev

    def slow(*args: Any) -> int:
        begun.set()
        assert cleared.wait(20)
        return pwritev(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    assert store(engine) == TOKENS
    assert begun.wait(20)
    assert other.clear() == 0
    cleared.set()
    result = engine.flush()
    assert not result, "none of it is on the disk"
    assert result.dropped == {"cancelled": 4}
    assert on_disk(folder) == 0
    becomes(0, engine)
    assert store(engine) == TOKENS
    assert engine.flush()
    assert on_disk(folder) == 4


def test_what_is_stored_as_soon_as_another_process_has_cleared_reaches_the_disk(
    folder: Path, other: Other, engine: CacheEngine
) -> None:
    for salt in ("a", "b", "c", "d"):
        assert other.clear() >= 0
        assert store(engine, salt) == TOKENS
        written = engine.flush()
        assert on_disk(folder) == 4 or not written
        assert written


def test_a_clear_here_drops_nothing_that_is_stored_after_it(folder: Path, engine: CacheEngine) -> None:
    for _ in range(3):
        engine.clear()
        assert store(engine) == TOKENS
        assert engine.flush()
        assert found(engine) == TOKENS
        assert on_disk(folder) == 4
    time.sleep(0.3)  # longer than it takes to notice a clear
    assert found(engine) == TOKENS
    assert engine.flush()
