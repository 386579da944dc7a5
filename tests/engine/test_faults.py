"""Whatever a tier does, the engine gets right tokens or a miss; nothing hangs, nothing leaks, and it works again afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lmcache import CacheEngine
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Read, Result, Write
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.kvlab import CHUNK, Pool, scattered, tiny_config, tiny_spec

CHUNKS = 4
TOKENS = torch.arange(CHUNKS * CHUNK)


class Faulty(MemoryTier):
    """A remote store that can be told to misbehave in ways that a real one does but cannot be made to on demand."""

    name = "remote"

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.hang = threading.Event()  # set = calls go through
        self.hang.set()
        self.reads: Callable[[Sequence[Read]], list[Result]] | None = None
        self.writes: Callable[[Sequence[Write]], list[Result]] | None = None

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        self.hang.wait()
        return super().contains(ids, deadline=deadline)

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        self.hang.wait()
        # A careless tier: it does not look at the deadline, and fills the buffers long after it.
        return self.reads(reads) if self.reads else super().read_into(reads)

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        self.hang.wait()
        return self.writes(writes) if self.writes else super().write(writes)


class Case:
    """A prompt that lies in the remote tier only, and a target to load it into."""

    def __init__(self, tier: Faulty, engine: CacheEngine) -> None:
        self.tier, self.engine = tier, engine
        self.source, self.target = Pool("packed", 40, seed=1), Pool("packed", 40, seed=2)
        self.slots = scattered(len(TOKENS), self.source, seed=3)

    def load(self) -> int:
        with self.engine.lookup(TOKENS) as hit:
            loaded = self.engine.retrieve(hit, self.target.kv, self.slots)
        got, want = self.target.sequence(self.slots[:loaded]), self.source.sequence(self.slots[:loaded])
        assert got == want, "what is called loaded is right"
        return loaded


@pytest.fixture
def case() -> Iterator[Case]:
    tier = Faulty()
    filler = CacheEngine(tiny_config(), tiny_spec(), tiers=[tier])
    made = Case(tier, filler)
    filler.store(TOKENS, made.source.kv, made.slots)
    assert filler.flush()
    made.engine = CacheEngine(tiny_config(load_timeout_s=0.3, probe_timeout_s=0.2), tiny_spec(), tiers=[tier])
    yield made
    tier.hang.set()
    made.engine._index.check()
    made.engine.close()


def quiet(engine: CacheEngine) -> None:
    """No lease, no job, no slot in between: everything was given back."""
    assert engine._drain(20, "load")
    assert engine._drain(20, "prefetch")
    assert engine._drain(20, "delete")
    assert engine.flush()
    stats = engine.stats()
    assert stats["index_leases"] == 0
    assert stats["index_jobs"] == 0
    assert stats["index_slots_leaving"] == 0


def test_a_healthy_tier_serves(case: Case) -> None:
    assert case.load() == len(TOKENS)
    quiet(case.engine)


def test_a_hanging_read_is_a_miss_in_bounded_time_and_never_writes_engine_memory_later(case: Case) -> None:
    case.tier.hang.clear()
    before = case.target.snapshot()
    began = time.monotonic()
    with case.engine.lookup(TOKENS) as hit:
        assert hit.tokens == len(TOKENS)
        assert case.engine.retrieve(hit, case.target.kv, case.slots) == 0
    assert time.monotonic() - began < 20
    leaving = case.engine.stats()
    assert leaving["index_jobs"] > 0, "the hung job still owns its slots"
    case.tier.hang.set()
    quiet(case.engine)
    assert all(torch.equal(a, b) for a, b in zip(before, case.target.snapshot(), strict=True))
    assert case.load() == len(TOKENS), "the tier works again"


def test_slots_under_a_hung_read_are_not_reused_while_it_hangs(case: Case) -> None:
    case.tier.hang.clear()
    with case.engine.lookup(TOKENS) as hit:
        assert case.engine.retrieve(hit, case.target.kv, case.slots) == 0
    pools, prompts = [], []
    for n in range(30):  # far more than the arena holds
        pool, tokens = Pool("packed", 40, seed=100 + n), TOKENS + 1000 * (n + 1)
        case.engine.store(tokens, pool.kv, case.slots)
        pools.append(pool)
        prompts.append(tokens)
    case.tier.hang.set()
    quiet(case.engine)
    found = 0
    for pool, tokens in zip(pools, prompts, strict=True):
        with case.engine.lookup(tokens) as hit:
            loaded = case.engine.retrieve(hit, case.target.kv, case.slots)
        assert case.target.sequence(case.slots[:loaded]) == pool.sequence(case.slots[:loaded])
        found += loaded
    assert found


def test_a_shared_tier_that_does_not_answer_probes_is_a_miss_in_bounded_time() -> None:
    tier = Faulty(shared=True)
    with CacheEngine(tiny_config(probe_timeout_s=0.1), tiny_spec(), tiers=[tier]) as engine:
        tier.hang.clear()
        began = time.monotonic()
        with engine.lookup(TOKENS) as hit:
            assert (hit.tokens, hit.stop) == (0, "late")
        assert time.monotonic() - began < 10
        tier.hang.set()


def test_a_tier_that_hangs_for_ever_does_not_keep_close_waiting() -> None:
    tier = Faulty()
    engine = CacheEngine(tiny_config(load_timeout_s=0.1), tiny_spec(), tiers=[tier])
    pool = Pool("packed", 40)
    tier.hang.clear()
    engine.store(TOKENS, pool.kv, scattered(len(TOKENS), pool))
    assert not engine.flush(timeout=0.1)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 60
    tier.hang.set()


def corrupt(case: Case, change: Callable[[bytearray], object]) -> None:
    for id, data in list(case.tier._objects.items()):
        content = bytearray(data)
        change(content)
        case.tier._objects[id] = bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.__setitem__(-2000, c[-2000] ^ 1),
        lambda c: c.__setitem__(100, c[100] ^ 4),
        lambda c: c.__delitem__(slice(len(c) // 2, None)),
        lambda c: c.clear(),
        lambda c: c.__setitem__(slice(0, 8), (1 << 30).to_bytes(8, "little")),
        lambda c: c.__setitem__(slice(None), b"hello"),
    ],
    ids=["payload bit", "header bit", "truncated", "empty", "1 GiB header", "foreign"],
)
def test_damaged_objects_are_misses_are_counted_and_are_replaced(
    case: Case, change: Callable[[bytearray], object]
) -> None:
    corrupt(case, change)
    assert case.load() == 0
    stats = case.engine.stats()
    assert stats['lmcache_corruptions_total{tier="remote"}'] >= 1
    quiet(case.engine)  # by then the damaged copies are removed
    case.engine.store(TOKENS, case.source.kv, case.slots)
    quiet(case.engine)
    case.engine.close()
    case.engine = CacheEngine(tiny_config(), tiny_spec(), tiers=[reopened(case.tier)])
    assert case.load() == len(TOKENS), "good copies took their places"


def reopened(tier: Faulty) -> Faulty:
    fresh = Faulty()
    fresh._objects = tier._objects
    return fresh


def test_objects_of_a_newer_format_are_misses_and_are_left_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache import objectfile, objectheader

    monkeypatch.setattr(objectfile, "FORMAT", objectheader.FORMAT + 1)
    newer = Faulty()
    with CacheEngine(tiny_config(), tiny_spec(), tiers=[newer]) as writer:
        writer.store(TOKENS, case.source.kv, case.slots)
        writer.flush()
    case.tier._objects.update(newer._objects)
    before = dict(case.tier._objects)
    assert case.load() == 0
    quiet(case.engine)
    assert case.tier._objects == before


def test_objects_under_each_others_names_are_never_served(case: Case) -> None:
    ids = list(case.tier._objects)
    data = list(case.tier._objects.values())
    case.tier._objects = dict(zip(ids, data[1:] + data[:1], strict=True))
    assert case.load() == 0


def test_objects_that_vanish_after_the_lookup_shorten_the_load(case: Case) -> None:
    with case.engine.lookup(TOKENS) as hit:
        assert hit.tokens == len(TOKENS)
        doomed = sorted(case.tier._objects, key=lambda id: id.depth)[2]
        del case.tier._objects[doomed]
        assert case.engine.retrieve(hit, case.target.kv, case.slots) == 2 * CHUNK
    assert case.load() == 2 * CHUNK


@pytest.mark.parametrize("status", [Status.FAILED, Status.FULL, Status.MISSING, Status.LATE])
def test_a_read_that_fails_is_a_miss_and_the_next_request_tries_anew(case: Case, status: Status) -> None:
    case.tier.reads = lambda reads: [Result(status, 0, "injected")] * len(reads)
    assert case.load() == 0
    case.tier.reads = None
    quiet(case.engine)
    if status in (Status.FULL, Status.LATE):  # the others say that the object cannot be had there: that is believed
        assert case.load() == len(TOKENS)


def test_a_tier_that_raises_is_a_miss(case: Case) -> None:
    def boom(_: object) -> list[Result]:
        raise RuntimeError("a bug in somebody's tier")

    case.tier.reads = boom
    assert case.load() == 0
    case.tier.writes = boom
    pool = Pool("packed", 40, seed=9)
    case.engine.store(TOKENS + 1, pool.kv, case.slots)
    quiet(case.engine)
    with case.engine.lookup(TOKENS + 1) as hit:
        assert hit.by_tier == {"dram": len(TOKENS)}, "DRAM serves on"


def test_a_full_tier_loses_nothing_but_the_copy_below(case: Case) -> None:
    case.tier.writes = lambda writes: [Result(Status.FULL, 0, "injected")] * len(writes)
    pool = Pool("packed", 40, seed=9)
    for n in range(1, 60):
        assert case.engine.store(TOKENS + n, pool.kv, case.slots) == len(TOKENS), f"round {n}"
        assert case.engine.flush()
    quiet(case.engine)


def test_write_behind_is_bounded_and_a_slow_tier_never_blocks_a_store(case: Case) -> None:
    case.tier.hang.clear()
    pool = Pool("packed", 40, seed=9)
    accepted = [case.engine.store(TOKENS + n, pool.kv, case.slots) for n in range(1, 40)]
    assert accepted[0] == len(TOKENS)
    assert 0 in accepted, "slots that wait to be written are not given away: the store is dropped"
    assert case.engine.stats()['lmcache_skipped_stores_total{reason="full"}'] > 0
    case.tier.hang.set()
    quiet(case.engine)
    assert case.engine.store(TOKENS + 99, pool.kv, case.slots) == len(TOKENS)


def test_ten_thousand_cycles_leave_everything_where_it_began(tmp_path: Path) -> None:
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    folder = root / f"lmcache-cycles-{os.getpid()}"
    spec = tiny_spec()
    pool = Pool("packed", 16, seed=1)
    slots = scattered(2 * CHUNK, pool)

    def cycles(engine: CacheEngine, first: int, last: int) -> None:
        for n in range(first, last):
            tokens = torch.arange(2 * CHUNK) + 7 * (n % 3000)
            engine.store(tokens, pool.kv, slots)
            with engine.lookup(tokens) as hit:
                engine.retrieve(hit, pool.kv, slots)
            if n % 5 == 0:
                engine.lookup(tokens)  # a request that dies without releasing its lease
        assert engine.flush()

    try:
        config = tiny_config(
            dram_bytes=16 * spec.object_bytes(0, CHUNK), disk_path=folder, disk_bytes="4MiB", lease_s=0.2
        )
        others = set(threading.enumerate())
        with CacheEngine(config, spec) as engine:
            cycles(engine, 0, 500)
            handles = len(os.listdir("/proc/self/fd"))
            memory = engine._arenas[0].allocated_bytes
            cycles(engine, 500, 10_000)
            time.sleep(0.3)
            stats = engine.stats()
            assert stats["index_leases"] == 0
            assert stats["index_jobs"] == 0
            assert stats["index_slots_leaving"] == 0
            assert stats['lmcache_evictions_total{tier="dram"}'] > 1000
            engine._index.check()
            assert engine._arenas[0].allocated_bytes == memory
            assert len(os.listdir("/proc/self/fd")) <= handles
            assert len(set(threading.enumerate()) - others) <= 2 * config.io_threads + 2
            used = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
            assert used <= 4 << 20
        assert set(threading.enumerate()) <= others
    finally:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def test_sixteen_threads_share_one_engine(tmp_path: Path) -> None:
    spec = tiny_spec()
    config = tiny_config(dram_bytes=24 * spec.object_bytes(0, CHUNK), disk_path=tmp_path)
    wrong: list[str] = []

    def work(engine: CacheEngine, seed: int) -> None:
        source, target = Pool("packed", 40, seed=seed % 4), Pool("packed", 40, seed=50 + seed)
        slots = scattered(len(TOKENS), source, seed=3)
        tokens = TOKENS + 1000 * (seed % 4)
        for _ in range(25):
            engine.store(tokens, source.kv, slots)
            with engine.lookup(tokens) as hit:
                loaded = engine.retrieve(hit, target.kv, slots)
            if target.sequence(slots[:loaded]) != source.sequence(slots[:loaded]):
                wrong.append(f"thread {seed}")

    with CacheEngine(config, spec) as engine:
        threads = [threading.Thread(target=work, args=(engine, n)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        quiet(engine)
        engine._index.check()
    assert not wrong
