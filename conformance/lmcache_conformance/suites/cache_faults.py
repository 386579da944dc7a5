"""A cache under faults: correct bits or a miss, no hang, no flushed data lost, and full function afterwards."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from lmcache.plan import Status
from lmcache.tiers.base import Read, Result
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.faulty_tier import (
    DAMAGE,
    TOKENS,
    Case,
    FaultyTier,
    FaultyTierFactory,
    assert_idle,
    within,
)
from lmcache_conformance.labs.fresh_interpreter import start_in_new_process
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec
from lmcache_conformance.labs.our_tiers import enospc
from lmcache_conformance.runner.marks import level


class CacheFaultTests(FaultyTierFactory):
    """Damage, failures, and tiers that are slow, dead or full."""

    # ---------------------------------------------------------------- damaged or wrong data in the tier

    @level(Level.FAULTS)
    def test_a_healthy_tier_serves(self, case: Case) -> None:
        assert case.load() == len(TOKENS)
        case.assert_idle()

    @level(Level.FAULTS)
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_objects_are_misses_are_counted_and_are_replaced(self, case: Case, damage: str) -> None:
        for id, data in list(case.tier.contents().items()):
            content = bytearray(data)
            DAMAGE[damage](content)
            case.tier.contents()[id] = bytes(content)
        assert case.load() == 0, "tokens were reported as loaded although every object is damaged"
        assert case.cache.stats()['lmcache_corruptions_total{tier="remote"}'] >= 1, "the damage was not counted"
        case.assert_idle()  # by then the damaged copies are removed
        case.cache.store(TOKENS, case.source.kv, case.slots)
        case.assert_idle()
        case.cache.close()
        case.cache = self.reopen(case.tier)
        assert case.load() == len(TOKENS), "the damaged copies were not replaced with intact ones"

    @level(Level.FAULTS)
    def test_a_damaged_object_that_nobody_has_read_is_written_anew(self, case: Case) -> None:
        """A flush vouches for what is on the tier, not for a name that is taken."""
        case.tier.shared = True
        for id, data in list(case.tier.contents().items()):
            case.tier.contents()[id] = data[: len(data) // 2]
        case.cache.close()
        case.cache = self.reopen(case.tier)
        assert case.cache.store(TOKENS, case.source.kv, case.slots) == len(TOKENS)
        assert case.cache.flush(timeout=case.patience), "flush did not say that everything is on the tier"
        case.cache.close()
        case.cache = self.reopen(case.tier)
        assert case.load() == len(TOKENS), "flush vouched for objects that are damaged"

    @level(Level.FAULTS)
    def test_objects_with_swapped_ids_are_never_served(self, case: Case) -> None:
        contents = case.tier.contents()
        ids, data = list(contents), list(contents.values())
        contents.update(zip(ids, data[1:] + data[:1], strict=True))
        assert case.load() == 0

    @level(Level.FAULTS)
    def test_a_read_that_reports_success_without_reading_is_detected(self, case: Case) -> None:
        """The buffers keep their old contents, which may be the valid header of another read."""
        assert case.load() == len(TOKENS)
        case.cache.close()
        case.cache = self.reopen(case.tier)
        case.tier.reads = lambda reads: [Result(Status.OK, sum(r.length for r in read.ranges)) for read in reads]
        assert case.load() == 0, "a read that transferred nothing was accepted as successful"

    @level(Level.FAULTS)
    def test_a_read_that_reports_more_than_it_read_is_detected(self, case: Case) -> None:
        def half(reads: Sequence[Read]) -> list[Result]:
            results = []
            for read in reads:
                data = case.tier.contents()[read.id]
                data = data[: len(data) // 2]
                for buffer, (offset, length) in zip(read.buffers, read.ranges, strict=True):
                    part = data[offset : offset + length]
                    buffer[: len(part)] = part
                results.append(Result(Status.OK, sum(r.length for r in read.ranges)))
            return results

        case.tier.reads = half
        assert case.load() == 0, "half an object was reported as loaded; the rest is the buffer's old content"

    @level(Level.FAULTS)
    def test_objects_that_vanish_after_the_lookup_shorten_the_load(self, case: Case) -> None:
        with case.cache.lookup(TOKENS) as hit:
            assert hit.tokens == len(TOKENS)
            doomed = sorted(case.tier.contents(), key=lambda id: id.depth)[2]
            del case.tier.contents()[doomed]
            loaded = within(self.patience, lambda: case.cache.retrieve(hit, case.target.kv, case.slots))
        assert loaded == 2 * CHUNK, f"chunk 2 is gone, but {loaded} tokens were reported as loaded"
        held = case.slots[:loaded]
        assert case.target.sequence(held) == case.source.sequence(held)
        assert case.load() == 2 * CHUNK

    @level(Level.FAULTS)
    @pytest.mark.parametrize("status", [Status.FAILED, Status.FULL, Status.MISSING, Status.LATE])
    def test_a_failed_read_is_a_miss_and_the_prompt_can_be_stored_again(self, case: Case, status: Status) -> None:
        case.tier.reads = lambda reads: [Result(status, 0, "injected")] * len(reads)
        assert case.load() == 0
        case.tier.reads = None
        case.assert_idle()
        other = Pool("packed", 40, seed=1)  # the engine recomputes the same values
        case.cache.store(TOKENS, other.kv, case.slots)
        assert case.load() == len(TOKENS), "after a failed load the prompt cannot be cached any more"

    @level(Level.FAULTS)
    def test_a_tier_that_raises_is_a_miss(self, case: Case) -> None:
        def boom(_: object) -> list[Result]:
            raise RuntimeError("a bug in a third-party tier")

        case.tier.reads = boom
        assert case.load() == 0
        case.tier.writes = boom
        pool = Pool("packed", 40, seed=9)
        case.cache.store(TOKENS + 1, pool.kv, case.slots)
        case.assert_idle()
        with case.cache.lookup(TOKENS + 1) as hit:
            assert hit.by_tier == {"dram": len(TOKENS)}, "DRAM stopped serving after the tier failed"

    @level(Level.FAULTS)
    def test_a_failed_write_is_never_a_hit_in_a_fresh_cache(self, case: Case) -> None:
        pool = Pool("packed", 40, seed=9)
        for number, status in enumerate((Status.FAILED, Status.FULL, Status.LATE), 1):
            case.tier.writes = lambda writes, status=status: [Result(status, 0, "injected")] * len(writes)
            case.cache.store(TOKENS + number, pool.kv, case.slots)
            case.assert_idle()
        case.tier.writes = None
        case.cache.close()
        case.cache = self.reopen(case.tier)
        for number in range(1, 4):
            with case.cache.lookup(TOKENS + number) as hit:
                assert hit.tokens == 0, "a failed store is visible"

    # ---------------------------------------------------------------- slow and dead

    @level(Level.FAULTS)
    def test_a_hanging_read_is_a_miss_in_bounded_time_and_never_writes_engine_memory_later(self, case: Case) -> None:
        case.cache.close()
        case.cache = self.reopen(case.tier, load_timeout_s=0.3)
        case.tier.answers.clear()
        before = case.target.snapshot()
        with case.cache.lookup(TOKENS) as hit:
            assert hit.tokens == len(TOKENS)
            assert within(self.patience, lambda: case.cache.retrieve(hit, case.target.kv, case.slots)) == 0
        case.tier.answers.set()
        case.assert_idle()
        same = all(torch.equal(a, b) for a, b in zip(before, case.target.snapshot(), strict=True))
        assert same, "the engine's memory was written after the load had been abandoned"
        assert case.load_with_retries() == len(TOKENS), "the tier answers again, but nothing is loaded from it"

    @level(Level.FAULTS)
    def test_slots_under_a_hung_read_are_not_reused_while_it_hangs(self, case: Case) -> None:
        case.cache.close()
        case.cache = self.reopen(case.tier, load_timeout_s=0.3)
        case.tier.answers.clear()
        with case.cache.lookup(TOKENS) as hit:
            assert within(self.patience, lambda: case.cache.retrieve(hit, case.target.kv, case.slots)) == 0
        pools, prompts = [], []
        for n in range(30):  # far more than the arena holds
            pool, tokens = Pool("packed", 40, seed=100 + n), TOKENS + 1000 * (n + 1)
            within(self.patience, lambda tokens=tokens, pool=pool: case.cache.store(tokens, pool.kv, case.slots))  # type: ignore[misc]
            pools.append(pool)
            prompts.append(tokens)
        case.tier.answers.set()
        case.assert_idle()
        found = 0
        for pool, tokens in zip(pools, prompts, strict=True):
            with case.cache.lookup(tokens) as hit:
                loaded = case.cache.retrieve(hit, case.target.kv, case.slots)
            got, want = case.target.sequence(case.slots[:loaded]), pool.sequence(case.slots[:loaded])
            assert got == want, "a hung read filled a slot that had been reused for another object"
            found += loaded
        assert found

    @level(Level.FAULTS)
    def test_a_shared_tier_that_does_not_answer_is_a_miss_in_bounded_time(self) -> None:
        tier = FaultyTier(shared=True)
        with self.open_cache(tiny_config(probe_timeout_s=0.1), tiny_spec(), [tier]) as cache:
            tier.answers.clear()
            try:
                assert within(self.patience, lambda: cache.lookup(TOKENS).tokens) == 0
            finally:
                tier.answers.set()

    @level(Level.FAULTS)
    def test_a_dead_tier_blocks_neither_store_nor_close(self) -> None:
        tier = FaultyTier()
        cache = self.open_cache(tiny_config(load_timeout_s=0.1), tiny_spec(), [tier])
        pool = Pool("packed", 40)
        slots = scattered(len(TOKENS), pool)
        tier.answers.clear()
        try:
            for n in range(3):
                within(self.patience, lambda n=n: cache.store(TOKENS + n, pool.kv, slots))  # type: ignore[misc]
            assert not within(self.patience, lambda: cache.flush(timeout=0.1)), (
                "flush reported success although nothing was written"
            )
            with mock.patch("lmcache.engine.CLOSE_S", 0.5):
                within(self.patience, cache.close)
        finally:
            tier.answers.set()

    @level(Level.FAULTS)
    def test_a_full_disk_costs_only_copies_on_disk_and_recovers(self, place: Path) -> None:
        pool = Pool("packed", 40, seed=1)
        slots = scattered(len(TOKENS), pool)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            with enospc():
                for n in range(30):
                    tokens = TOKENS + n
                    stored = within(self.patience, lambda tokens=tokens: cache.store(tokens, pool.kv, slots))  # type: ignore[misc]
                    assert stored == len(TOKENS), f"store {n}"
                    assert not within(self.patience, cache.flush), "flush claims what a full disk did not take"
                assert_idle(cache, self.patience)
                assert not list(place.rglob("*.safetensors"))
            until = time.monotonic() + self.patience
            n = 100
            while not list(place.rglob("*.safetensors")):
                assert time.monotonic() < until, "there is free space again, but nothing is written any more"
                n += 1
                cache.store(TOKENS + n, pool.kv, slots)
                cache.flush()
                time.sleep(0.02)

    # ---------------------------------------------------------------- another process

    @level(Level.FAULTS)
    def test_after_kill9_all_flushed_objects_are_served_and_no_wrong_bits(self, place: Path) -> None:
        child = start_in_new_process(self, "store_for_ever", str(place))
        flushed = -1
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("FLUSHED"):
                    flushed = int(line.split()[1])
                if flushed >= 4:
                    break
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert flushed >= 4, f"the process ended by itself: {(child.stderr.read() if child.stderr else '')[-2000:]}"
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            for n in range(flushed + 5):
                source, target = Pool("packed", 40, seed=n), Pool("packed", 40, seed=5000)
                slots = scattered(len(TOKENS), source, seed=3)
                with cache.lookup(TOKENS + n) as hit:
                    loaded = cache.retrieve(hit, target.kv, slots)
                assert target.sequence(slots[:loaded]) == source.sequence(slots[:loaded]), (
                    f"prompt {n}: wrong bits loaded"
                )
                assert n > flushed or loaded == len(TOKENS), (
                    f"prompt {n} was flushed, but only {loaded} of its tokens are left"
                )

    def store_for_ever(self, place: str) -> None:
        """Stores one prompt after another and prints its progress. Runs in another process, until it is killed."""
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            for n in range(10_000):
                pool = Pool("packed", 40, seed=n)
                cache.store(TOKENS + n, pool.kv, scattered(len(TOKENS), pool, seed=3))
                if n % 2 == 0:
                    cache.flush()
                    sys.stdout.write(f"FLUSHED {n}\n")
                    sys.stdout.flush()
