"""A cache under faults, pressure and threads: right bits or a miss, nothing hangs, nothing leaks, and it works again."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest
import torch

from lmcache import CacheEngine
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Read, Result, Write
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.cache import CacheBytesTests, CacheFactory, tokens_of
from lmcache_conformance.contract import Level
from lmcache_conformance.elsewhere import started
from lmcache_conformance.kvlab import CHUNK, Pool, scattered, tiny_config, tiny_spec
from lmcache_conformance.marks import level
from lmcache_conformance.ours import enospc

T = TypeVar("T")
CHUNKS = 4
TOKENS = torch.arange(CHUNKS * CHUNK)
Reads = Callable[[Sequence[Read]], list[Result]]
Writes = Callable[[Sequence[Write]], list[Result]]


class Moody(MemoryTier):
    """A remote store that can be told to misbehave in ways that a real one does but cannot be made to on demand."""

    name = "remote"

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.answers = threading.Event()  # set = calls go through
        self.answers.set()
        self.reads: Reads | None = None
        self.writes: Writes | None = None

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Hangs, or not."""
        self.answers.wait()
        return super().contains(ids, deadline=deadline)

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """A careless tier: it does not look at the deadline, and fills the buffers long after it."""
        self.answers.wait()
        return self.reads(reads) if self.reads else super().read_into(reads)

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """Hangs, fails, or not."""
        self.answers.wait()
        return self.writes(writes) if self.writes else super().write(writes)

    def close(self) -> None:
        """A store outlives its clients."""

    def contents(self) -> dict[ObjectId, bytes]:
        """The stored bytes themselves, to be damaged."""
        return self._objects


class Case:
    """A prompt that lies in the remote tier only, a fresh cache over it, and a target to load into."""

    def __init__(self, tier: Moody, cache: CacheEngine, source: Pool, slots: torch.Tensor, patience: float) -> None:
        self.tier, self.cache, self.source, self.slots = tier, cache, source, slots
        self.patience = patience
        self.target = Pool("packed", 40, seed=2)

    def load(self) -> int:
        """Tokens loaded; whatever is called loaded must be right."""

        def call() -> int:
            with self.cache.lookup(TOKENS) as hit:
                loaded = self.cache.retrieve(hit, self.target.kv, self.slots)
            assert loaded <= hit.tokens
            return loaded

        loaded = within(self.patience, call)
        got, want = self.target.sequence(self.slots[:loaded]), self.source.sequence(self.slots[:loaded])
        assert got == want, f"{loaded} tokens are called loaded, and are not what was stored"
        return loaded

    def quiet(self) -> None:
        """No lease, no job, no slot in between: everything was given back."""
        quiet(self.cache, self.patience)


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns; an assertion fails if it raises or hangs."""
    done: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it hangs: no answer after {seconds:g} s"
    if errors and isinstance(errors[0], AssertionError):
        raise errors[0]
    assert not errors, f"a failure of the cache must be a miss, but it raised {type(errors[0]).__name__}: {errors[0]}"
    return done[0]


def quiet(cache: CacheEngine, patience: float) -> None:
    """Nothing is held once all is over."""
    until = time.monotonic() + patience
    while True:
        cache.flush(timeout=patience)
        stats = cache.stats()
        held = {name: stats[name] for name in ("index_leases", "index_jobs", "index_slots_leaving") if stats[name]}
        if not held:
            return
        assert time.monotonic() < until, f"with all requests over, the cache still holds {held}"
        time.sleep(0.01)


assert tiny_spec().object_bytes(0, CHUNK) == 3072  # so that the places below are what they say
DAMAGE: dict[str, Callable[[bytearray], object]] = {
    "a bit of the payload": lambda c: c.__setitem__(-2000, c[-2000] ^ 1),  # the last 1024 bytes are padding
    "a bit of the header": lambda c: c.__setitem__(100, c[100] ^ 4),
    "truncated by half": lambda c: c.__delitem__(slice(len(c) // 2, None)),
    "truncated by a few bytes of payload": lambda c: c.__delitem__(slice(len(c) - 1024 - 64, None)),
    "truncated in the header": lambda c: c.__delitem__(slice(1000, None)),
    "empty": lambda c: c.clear(),
    "a header of 1 GiB": lambda c: c.__setitem__(slice(0, 8), (1 << 30).to_bytes(8, "little")),
    "something else": lambda c: c.__setitem__(slice(None), b"hello"),
}


class CacheFaultTests(CacheFactory):
    """Faults, pressure, concurrency."""

    @pytest.fixture
    def case(self) -> Iterator[Case]:
        """Four chunks in a remote tier, nothing in DRAM."""
        tier = Moody()
        source = Pool("packed", 40, seed=1)
        slots = scattered(len(TOKENS), source, seed=3)
        filler = self.open_cache(tiny_config(), tiny_spec(), [tier])
        filler.store(TOKENS, source.kv, slots)
        assert filler.flush()
        filler.close()
        case = Case(tier, self.reopen(tier), source, slots, self.patience)
        yield case
        tier.answers.set()
        case.cache.close()

    def reopen(self, tier: Moody) -> CacheEngine:
        """A fresh cache over this tier."""
        return self.open_cache(tiny_config(load_timeout_s=0.3, probe_timeout_s=0.2), tiny_spec(), [tier])

    # ---------------------------------------------------------------- what lies there is not what was stored

    @level(Level.FAULTS)
    def test_a_healthy_tier_serves(self, case: Case) -> None:
        assert case.load() == len(TOKENS)
        case.quiet()

    @level(Level.FAULTS)
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_objects_are_misses_are_counted_and_are_replaced(self, case: Case, damage: str) -> None:
        for id, data in list(case.tier.contents().items()):
            content = bytearray(data)
            DAMAGE[damage](content)
            case.tier.contents()[id] = bytes(content)
        assert case.load() == 0, "nothing there is whole, and something is called loaded"
        assert case.cache.stats()['lmcache_corruptions_total{tier="remote"}'] >= 1, "nobody is told"
        case.cache.store(TOKENS, case.source.kv, case.slots)
        case.quiet()
        case.cache.close()
        case.cache = self.reopen(case.tier)
        assert case.load() == len(TOKENS), "good copies did not take the place of the damaged ones"

    @level(Level.FAULTS)
    def test_objects_under_each_others_names_are_never_served(self, case: Case) -> None:
        contents = case.tier.contents()
        ids, data = list(contents), list(contents.values())
        contents.update(zip(ids, data[1:] + data[:1], strict=True))
        assert case.load() == 0

    @level(Level.FAULTS)
    def test_a_tier_that_says_it_read_and_did_not_is_found_out(self, case: Case) -> None:
        """The buffers still hold what they held before: perhaps the right header of another read."""
        assert case.load() == len(TOKENS)
        case.cache.close()
        case.cache = self.reopen(case.tier)
        case.tier.reads = lambda reads: [Result(Status.OK, sum(r.length for r in read.ranges)) for read in reads]
        assert case.load() == 0, "a read that moved nothing is called a success"

    @level(Level.FAULTS)
    def test_a_tier_that_moves_half_and_says_all_is_found_out(self, case: Case) -> None:
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
        assert case.load() == 0, "half an object is called loaded; the rest is what lay in the buffer before"

    @level(Level.FAULTS)
    def test_objects_that_vanish_after_the_lookup_shorten_the_load(self, case: Case) -> None:
        with case.cache.lookup(TOKENS) as hit:
            assert hit.tokens == len(TOKENS)
            doomed = sorted(case.tier.contents(), key=lambda id: id.depth)[2]
            del case.tier.contents()[doomed]
            loaded = within(self.patience, lambda: case.cache.retrieve(hit, case.target.kv, case.slots))
        assert loaded == 2 * CHUNK, f"chunk 2 is gone, and {loaded} tokens are called loaded"
        held = case.slots[:loaded]
        assert case.target.sequence(held) == case.source.sequence(held)
        assert case.load() == 2 * CHUNK

    @level(Level.FAULTS)
    @pytest.mark.parametrize("status", [Status.FAILED, Status.FULL, Status.MISSING, Status.LATE])
    def test_a_read_that_fails_is_a_miss_and_what_is_computed_anew_is_right(self, case: Case, status: Status) -> None:
        case.tier.reads = lambda reads: [Result(status, 0, "injected")] * len(reads)
        assert case.load() == 0
        case.tier.reads = None
        case.quiet()
        other = Pool("packed", 40, seed=1)  # the engine recomputes the same values
        case.cache.store(TOKENS, other.kv, case.slots)
        assert case.load() == len(TOKENS), "after a failed load the prompt can't be cached any more"

    @level(Level.FAULTS)
    def test_a_tier_that_raises_is_a_miss(self, case: Case) -> None:
        def boom(_: object) -> list[Result]:
            raise RuntimeError("a bug in somebody's tier")

        case.tier.reads = boom
        assert case.load() == 0
        case.tier.writes = boom
        pool = Pool("packed", 40, seed=9)
        case.cache.store(TOKENS + 1, pool.kv, case.slots)
        case.quiet()
        with case.cache.lookup(TOKENS + 1) as hit:
            assert hit.by_tier == {"dram": len(TOKENS)}, "DRAM serves on"

    @level(Level.FAULTS)
    def test_a_write_that_failed_is_never_offered_by_a_fresh_cache(self, case: Case) -> None:
        pool = Pool("packed", 40, seed=9)
        for number, status in enumerate((Status.FAILED, Status.FULL, Status.LATE), 1):
            case.tier.writes = lambda writes, status=status: [Result(status, 0, "injected")] * len(writes)
            case.cache.store(TOKENS + number, pool.kv, case.slots)
            case.quiet()
        case.tier.writes = None
        case.cache.close()
        case.cache = self.reopen(case.tier)
        for number in range(1, 4):
            with case.cache.lookup(TOKENS + number) as hit:
                assert hit.tokens == 0, "a store that failed is visible"

    # ---------------------------------------------------------------- slow and dead

    @level(Level.FAULTS)
    def test_a_hanging_read_is_a_miss_in_bounded_time_and_never_writes_engine_memory_later(self, case: Case) -> None:
        case.tier.answers.clear()
        before = case.target.snapshot()
        with case.cache.lookup(TOKENS) as hit:
            assert hit.tokens == len(TOKENS)
            assert within(self.patience, lambda: case.cache.retrieve(hit, case.target.kv, case.slots)) == 0
        case.tier.answers.set()
        case.quiet()
        same = all(torch.equal(a, b) for a, b in zip(before, case.target.snapshot(), strict=True))
        assert same, "the engine's memory was written after the load had been given up"
        assert case.load() == len(TOKENS), "the tier works again"

    @level(Level.FAULTS)
    def test_slots_under_a_hung_read_are_not_reused_while_it_hangs(self, case: Case) -> None:
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
        case.quiet()
        found = 0
        for pool, tokens in zip(pools, prompts, strict=True):
            with case.cache.lookup(tokens) as hit:
                loaded = case.cache.retrieve(hit, case.target.kv, case.slots)
            got, want = case.target.sequence(case.slots[:loaded]), pool.sequence(case.slots[:loaded])
            assert got == want, "a read that hung has filled a slot that holds something else by now"
            found += loaded
        assert found

    @level(Level.FAULTS)
    def test_a_shared_tier_that_does_not_answer_is_a_miss_in_bounded_time(self) -> None:
        tier = Moody(shared=True)
        with self.open_cache(tiny_config(probe_timeout_s=0.1), tiny_spec(), [tier]) as cache:
            tier.answers.clear()
            try:
                assert within(self.patience, lambda: cache.lookup(TOKENS).tokens) == 0
            finally:
                tier.answers.set()

    @level(Level.FAULTS)
    def test_a_dead_tier_keeps_neither_store_nor_close_waiting(self) -> None:
        tier = Moody()
        cache = self.open_cache(tiny_config(load_timeout_s=0.1), tiny_spec(), [tier])
        pool = Pool("packed", 40)
        slots = scattered(len(TOKENS), pool)
        tier.answers.clear()
        try:
            for n in range(3):
                within(self.patience, lambda n=n: cache.store(TOKENS + n, pool.kv, slots))  # type: ignore[misc]
            assert not within(self.patience, lambda: cache.flush(timeout=0.1)), (
                "nothing was written, and flush says it was"
            )
            with mock.patch("lmcache.engine._CLOSE_S", 0.5):
                within(self.patience, cache.close)
        finally:
            tier.answers.set()

    @level(Level.FAULTS)
    def test_a_full_disk_costs_the_copies_on_disk_and_is_recovered_from(self, place: Path) -> None:
        pool = Pool("packed", 40, seed=1)
        slots = scattered(len(TOKENS), pool)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            with enospc():
                for n in range(30):
                    tokens = TOKENS + n
                    stored = within(self.patience, lambda tokens=tokens: cache.store(tokens, pool.kv, slots))  # type: ignore[misc]
                    assert stored == len(TOKENS), f"store {n}"
                    assert within(self.patience, cache.flush), "flush hangs on a full disk"
                quiet(cache, self.patience)
                assert not list(place.rglob("*.safetensors"))
            until = time.monotonic() + self.patience
            n = 100
            while not list(place.rglob("*.safetensors")):
                assert time.monotonic() < until, "there is space again, and nothing is written any more"
                n += 1
                cache.store(TOKENS + n, pool.kv, slots)
                cache.flush()
                time.sleep(0.02)

    # ---------------------------------------------------------------- pressure

    @level(Level.PRESSURE)
    def test_a_full_cache_evicts_and_goes_on(self) -> None:
        pool = Pool("packed", 64, seed=1)
        slots = scattered(4 * CHUNK, pool)
        spec = tiny_spec()
        with self.open_cache(tiny_config(dram_bytes=12 * spec.object_bytes(0, CHUNK)), spec) as cache:
            for n in range(20):
                tokens = tokens_of(4 * CHUNK, seed=n)
                stored = within(self.patience, lambda tokens=tokens: cache.store(tokens, pool.kv, slots))  # type: ignore[misc]
                assert stored == 4 * CHUNK, f"store {n}: {stored} tokens taken by a cache that could evict"
                with cache.lookup(tokens) as hit:
                    assert hit.tokens == 4 * CHUNK
            with cache.lookup(tokens_of(4 * CHUNK, seed=0)) as hit:
                assert (hit.tokens, hit.stop) == (0, "evicted")

    @level(Level.PRESSURE)
    def test_where_memory_runs_out_nothing_is_offered_and_nothing_raises(self) -> None:
        def refuse(nbytes: int) -> torch.Tensor:
            raise MemoryError(f"no {nbytes} bytes of host memory")

        pool, target = Pool("packed", 64, seed=1), Pool("packed", 64, seed=2)
        slots = scattered(4 * CHUNK, pool)
        with mock.patch("lmcache.arena.anonymous", refuse):
            cache = self.open_cache(tiny_config(pin_memory="never"), tiny_spec())
        try:
            for _ in range(2):
                within(self.patience, lambda: cache.store(TOKENS, pool.kv, slots))
                with cache.lookup(TOKENS) as hit:
                    assert hit.tokens == 0, "offered, though there was no memory to store it in"
                    assert within(self.patience, lambda hit=hit: cache.retrieve(hit, target.kv, slots)) == 0  # type: ignore[misc]
            quiet(cache, self.patience)
        finally:
            cache.close()

    @level(Level.PRESSURE)
    def test_a_leased_hit_survives_pressure(self) -> None:
        pool, target = Pool("packed", 64, seed=1), Pool("packed", 64, seed=2)
        slots = scattered(4 * CHUNK, pool)
        spec = tiny_spec()
        with self.open_cache(tiny_config(dram_bytes=12 * spec.object_bytes(0, CHUNK)), spec) as cache:
            cache.store(tokens_of(4 * CHUNK), pool.kv, slots)
            expected = pool.sequence(slots)
            with cache.lookup(tokens_of(4 * CHUNK)) as hit:
                for n in range(1, 10):
                    cache.store(tokens_of(4 * CHUNK, seed=n), Pool("packed", 64, seed=n + 10).kv, slots)
                assert cache.retrieve(hit, target.kv, slots) == 4 * CHUNK, "what was offered is gone"
            assert target.sequence(slots) == expected

    @level(Level.PRESSURE)
    def test_requests_that_die_without_a_word_pin_nothing_for_ever(self) -> None:
        pool = Pool("packed", 64, seed=1)
        slots = scattered(4 * CHUNK, pool)
        spec = tiny_spec()
        config = tiny_config(dram_bytes=8 * spec.object_bytes(0, CHUNK), lease_s=0.2)
        with self.open_cache(config, spec) as cache:
            abandoned = []
            for n in range(60):
                tokens = tokens_of(4 * CHUNK, seed=n)
                cache.store(tokens, pool.kv, slots)
                abandoned.append(cache.lookup(tokens))
                if n % 3 == 0:
                    with cache.lookup(tokens) as hit:
                        cache.retrieve(hit, pool.kv, slots)
            time.sleep(0.3)
            assert cache.store(tokens_of(4 * CHUNK, seed=999), pool.kv, slots) == 4 * CHUNK, (
                "pins leaked: the cache is stuck"
            )
            quiet(cache, self.patience)

    @level(Level.PRESSURE)
    def test_a_hit_on_disk_may_be_larger_than_dram(self, place: Path) -> None:
        tokens = tokens_of(20 * CHUNK)
        source, target = Pool("packed", 100, seed=1), Pool("packed", 100, seed=2)
        slots = scattered(20 * CHUNK, source, seed=3)
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            cache.store(tokens, source.kv, slots)
            cache.flush()
        eight = 8 * tiny_spec().object_bytes(0, CHUNK)
        with self.open_cache(tiny_config(dram_bytes=eight, disk_path=place), tiny_spec()) as cache:
            for _ in range(2):
                with cache.lookup(tokens) as hit:
                    assert hit.tokens == 20 * CHUNK
                    assert cache.retrieve(hit, target.kv, slots) == 20 * CHUNK
        assert target.sequence(slots) == source.sequence(slots)

    @level(Level.PRESSURE)
    def test_the_disk_stays_below_its_bound(self, place: Path) -> None:
        pool = Pool("packed", 64, seed=1)
        slots = scattered(16 * CHUNK, pool)
        bound = 1 << 20
        with self.open_cache(tiny_config(disk_path=place, disk_bytes=bound), tiny_spec()) as cache:
            written = 0
            for n in range(40):
                cache.store(tokens_of(16 * CHUNK, seed=n), pool.kv, slots)
                cache.flush()
                sizes = [_size(file) for file in place.rglob("*.safetensors")]
                assert sum(sizes) <= bound, f"{sum(sizes)} bytes on disk, {bound} are allowed"
                written = max(written, len(sizes))
            assert written >= 20, "hardly anything was written"
            with cache.lookup(tokens_of(16 * CHUNK, seed=39)) as hit:
                assert hit.tokens == 16 * CHUNK

    @level(Level.PRESSURE)
    def test_a_full_tier_loses_nothing_but_the_copy_below(self, case: Case) -> None:
        case.tier.writes = lambda writes: [Result(Status.FULL, 0, "injected")] * len(writes)
        pool = Pool("packed", 40, seed=9)
        for n in range(1, 40):
            assert case.cache.store(TOKENS + n, pool.kv, case.slots) == len(TOKENS), f"round {n}"
            assert case.cache.flush()
        case.quiet()

    # ---------------------------------------------------------------- concurrency

    @level(Level.CONCURRENCY)
    @pytest.mark.parametrize("caches", [1, 2])
    def test_sixteen_threads_share_caches_on_one_folder(self, place: Path, caches: int) -> None:
        spec = tiny_spec()
        config = tiny_config(dram_bytes=24 * spec.object_bytes(0, CHUNK), disk_path=place)
        opened = [self.open_cache(config, spec) for _ in range(caches)]
        wrong: list[str] = []

        def work(seed: int) -> None:
            cache = opened[seed % caches]
            source, target = Pool("packed", 40, seed=seed % 4), Pool("packed", 40, seed=50 + seed)
            slots = scattered(len(TOKENS), source, seed=3)
            tokens = TOKENS + 1000 * (seed % 4)
            for step in range(12):
                cache.store(tokens, source.kv, slots)
                with cache.lookup(tokens) as hit:
                    if step % 5 == 4:
                        continue  # cancelled
                    loaded = cache.retrieve(hit, target.kv, slots)
                if target.sequence(slots[:loaded]) != source.sequence(slots[:loaded]):
                    wrong.append(f"thread {seed}, step {step}")

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(16)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
                assert not thread.is_alive(), "a thread hangs"
            assert not wrong, f"wrong bits in {wrong}"
            for cache in opened:
                quiet(cache, self.patience)
        finally:
            for cache in opened:
                cache.close()

    # ---------------------------------------------------------------- another process

    @level(Level.FAULTS)
    def test_a_killed_process_leaves_only_right_bits_and_all_that_it_had_flushed(self, place: Path) -> None:
        child = started(self, "store_for_ever", str(place))
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
                assert target.sequence(slots[:loaded]) == source.sequence(slots[:loaded]), f"prompt {n} came back wrong"
                assert n > flushed or loaded == len(TOKENS), (
                    f"prompt {n} was flushed, and {loaded} tokens of it are left"
                )

    def store_for_ever(self, place: str) -> None:
        """Store one prompt after another and say how far it is. Runs in another process, until it is killed."""
        with self.open_cache(tiny_config(disk_path=place), tiny_spec()) as cache:
            for n in range(10_000):
                pool = Pool("packed", 40, seed=n)
                cache.store(TOKENS + n, pool.kv, scattered(len(TOKENS), pool, seed=3))
                if n % 2 == 0:
                    cache.flush()
                    sys.stdout.write(f"FLUSHED {n}\n")
                    sys.stdout.flush()


class CacheTests(CacheFaultTests, CacheBytesTests):
    """The whole contract of caches. (Random histories: `cachemachine`.)"""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # evicted just now
        return 0
