"""What happens to the process that holds a cache: interrupts, forks, files of other users."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache import CacheEngine, Config
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.faulty_tier import assert_idle
from lmcache_conformance.labs.interrupts import interrupted_at
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.cache_factory import CacheFactory, tokens_of

STEP = 11
"""Every how many moments a call is interrupted."""

STRANGER = 12_345
"""Another user's id."""

POOL = Pool("packed", 8, seed=1)
SLOTS = scattered(2 * CHUNK, POOL)


class CacheProcessTests(CacheFactory):
    """Interrupts, forks, users."""

    # ---------------------------------------------------------------- interrupts

    @level(Level.FAULTS)
    @pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    )  # an interrupt in a finaliser is ignored
    def test_an_interrupt_at_any_moment_leaves_a_working_cache(self, place: Path, lmcache_seed: int) -> None:
        """Ctrl-C in the middle of a lookup, retrieve or store; the process goes on, as a notebook does."""
        config = tiny_config(
            dram_bytes=8 * tiny_spec().object_bytes(0, CHUNK), disk_path=place, lease_s=0.5, policy="lru"
        )
        try:
            self._interrupt(config, lmcache_seed)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"after an interrupt the cache raised {type(error).__name__}: {error}") from error

    def _interrupt(self, config: Config, seed: int) -> None:
        with self.open_cache(config, tiny_spec()) as cache:
            for n in range(6):  # 12 chunks: DRAM has room for 8, the others are on disk
                self._use(cache, n)
            moment, n = 1 + seed % STEP, 0
            while interrupted_at(moment, lambda: self._use(cache, n)):  # noqa: B023
                moment, n = moment + STEP, (n + 1) % 6
            assert moment > 20 * STEP, "the cache was hardly interrupted"
            assert_idle(cache, self.patience)
            for n in range(100, 110):
                assert cache.store(tokens_of(2 * CHUNK, n), POOL.kv, SLOTS) == 2 * CHUNK, (
                    "after interrupts, stores find no room any more"
                )
                assert self._use(cache, n) == 2 * CHUNK
            assert self._use(cache, 0) == 2 * CHUNK, "a prompt that was stored before the interrupts is lost"

    def _use(self, cache: CacheEngine, number: int) -> int:
        """Loads and stores a prompt. Returns the number of tokens loaded, after checking their bits."""
        tokens, target = tokens_of(2 * CHUNK, number), Pool("packed", 8, seed=2)
        with cache.lookup(tokens) as hit:
            loaded = cache.retrieve(hit, target.kv, SLOTS)
        assert target.sequence(SLOTS[:loaded]) == POOL.sequence(SLOTS[:loaded]), f"prompt {number}: wrong bits"
        cache.store(tokens, POOL.kv, SLOTS)
        return loaded

    # ---------------------------------------------------------------- forks

    @level(Level.FAULTS)
    def test_a_forked_child_serves_or_misses_and_its_parent_goes_on(self, place: Path) -> None:
        """A fork copies a process's memory and locks, and none of its threads: what they would have done never happens."""
        if not hasattr(os, "fork"):
            pytest.skip("processes cannot be forked here")
        # A load that waits for a thread that the fork left behind counts as hung.
        config = tiny_config(disk_path=place, load_timeout_s=10 * self.patience, probe_timeout_s=10 * self.patience)
        with self.open_cache(config, tiny_spec()) as cache:
            for n in range(4):
                self._use(cache, n)
            assert cache.flush()
            with cache.lookup(tokens_of(2 * CHUNK, 0)) as hit:  # a lease and threads at the time of the fork
                loaded, stored, flushed = self._in_child(lambda: self._child(cache))
                target = Pool("packed", 8, seed=2)
                assert cache.retrieve(hit, target.kv, SLOTS) == 2 * CHUNK, "the child has taken its parent's KV away"
            assert set(loaded) <= {0, 2 * CHUNK}
            assert flushed or not stored, "what the child's stores have accepted is not written"
            assert [self._use(cache, n) for n in range(4)] == [2 * CHUNK] * 4
            self._use(cache, 5)
            assert cache.flush(), "after the fork, the parent writes nothing any more"
        with self.open_cache(config, tiny_spec()) as cache:
            found = [self._use(cache, n) for n in (0, 5, *((6,) if stored else ()))]
            assert set(found) == {2 * CHUNK}, f"in a new cache, {found} tokens of three prompts are found"

    def _child(self, cache: CacheEngine) -> tuple[list[int], int, bool]:
        torch.set_num_threads(1)  # the threads of torch itself do not survive a fork either
        loaded = [self._use(cache, n) for n in range(4)]
        stored = cache.store(tokens_of(2 * CHUNK, 6), POOL.kv, SLOTS)
        return loaded, stored, bool(cache.flush(timeout=self.patience))

    def _in_child(self, call: Callable[[], Any]) -> Any:
        """Returns what `call` returns in a forked child."""

        def run() -> None:
            try:
                answer = call()
            except BaseException as error:
                answer = error
            theirs.send(answer)

        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        try:
            assert ours.poll(self.patience), f"the child hangs: it has not ended after {self.patience:g} s"
            answer = ours.recv()
            process.join(self.patience)
        finally:
            process.kill()
        assert not isinstance(answer, BaseException), f"in the child, the cache raised {answer!r}"
        return answer

    # ---------------------------------------------------------------- users

    @level(Level.FAULTS)
    @pytest.mark.parametrize("what", ["the folder", "folders below it", "files"])
    def test_nothing_that_another_user_could_have_written_is_served(self, place: Path, what: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can give files to another user")
        root = place / "kv"
        with self.open_cache(tiny_config(disk_path=root), tiny_spec()) as cache:
            self._use(cache, 0)
            assert cache.flush()
        files = list(root.rglob("*.safetensors"))
        assert files
        parents = {folder for path in files for folder in path.parents if root in folder.parents}
        for path in {"the folder": {root}, "folders below it": parents, "files": set(files)}[what]:
            os.chown(path, STRANGER, STRANGER)
        with self.open_cache(tiny_config(disk_path=root), tiny_spec()) as cache:
            loaded = self._use(cache, 0)
            assert loaded == 0, f"{loaded} tokens were loaded, although {what} belong to another user"
            with cache.lookup(tokens_of(2 * CHUNK, 0)) as hit:
                assert hit.by_tier == {"dram": 2 * CHUNK}, "the recomputed prompt was not stored in DRAM"
