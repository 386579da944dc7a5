"""A tier under faults, pressure, restarts and concurrency, and random histories of all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine

from lmcache.plan import Status
from lmcache.tiers.base import Range, Read, Tier, Write
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.deadlines import Deadline, PassesAt
from lmcache_conformance.labs.fresh_interpreter import in_new_process
from lmcache_conformance.labs.tier_objects import (
    get,
    object_id,
    pattern,
    put,
)
from lmcache_conformance.runner.marks import level, requires
from lmcache_conformance.suites.tier_factory import TierFactory
from lmcache_conformance.suites.tier_machine import BoundedTierMachine, TierMachine, run_machine

GRACE_S = 0.2
"""How long what must not happen later is waited for."""


class TierFaultTests(TierFactory):
    """Faults, pressure, restart, concurrency."""

    # ---------------------------------------------------------------- faults

    @level(Level.FAULTS)
    def test_an_empty_object_is_refused(self, tier: Tier) -> None:
        assert put(tier, object_id(0), b"").status is Status.FAILED
        assert tier.contains([object_id(0)])[0].status is Status.MISSING
        assert get(tier, object_id(0), 10)[0].status is Status.MISSING

    @level(Level.FAULTS)
    def test_after_the_deadline_nothing_is_done(self, tier: Tier) -> None:
        put(tier, object_id(0), b"x")
        past = time.monotonic() - 1
        buffer = bytearray(b"?")
        assert tier.contains([object_id(0)], deadline=past)[0].status is Status.LATE
        read = Read(object_id(0), [memoryview(buffer)], [Range(0, 1)])
        assert tier.read_into([read], deadline=past)[0].status is Status.LATE
        assert tier.write([Write(object_id(1), [b"y"])], deadline=past)[0].status is Status.LATE
        assert tier.delete([object_id(0)], deadline=past)[0].status is Status.LATE
        assert bytes(buffer) == b"?"
        assert [found.id for found in tier.scan()] == [object_id(0)]

    @level(Level.FAULTS)
    def test_a_deadline_in_the_future_does_not_matter(self, tier: Tier) -> None:
        future = time.monotonic() + 60
        assert tier.write([Write(object_id(0), [b"y"])], deadline=future)[0].status is Status.OK
        assert tier.contains([object_id(0)], deadline=future)[0].status is Status.OK

    @level(Level.FAULTS)
    def test_a_write_that_was_not_accepted_is_not_visible(self, tier: Tier) -> None:
        """Whatever a write returns, a reader finds the whole object or none of it, and the next write may succeed."""
        refused = [
            tier.write([Write(object_id(0), [b"late"])], deadline=time.monotonic() - 1)[0].status,
            put(tier, object_id(1), b"").status,
        ]
        assert Status.OK not in refused
        for number in range(2):
            assert tier.contains([object_id(number)])[0].status is Status.MISSING, "a failed write is visible"
            assert get(tier, object_id(number), 10)[0].status is Status.MISSING
            assert put(tier, object_id(number), b"whole").nbytes == 5
            assert get(tier, object_id(number), 10)[1] == b"whole"

    @level(Level.FAULTS)
    @pytest.mark.parametrize("slow", ["between two items", "within one item"])
    def test_a_deadline_that_passes_during_a_write_leaves_the_rest_undone_now_and_later(
        self, tier: Tier, slow: str
    ) -> None:
        """What is LATE is not written, and does not appear later. The deadline passes while the tier fetches its input."""
        deadline = Deadline()
        ids = [object_id(number) for number in range(6)]
        writes = [Write(id, [b"head of an object", pattern(id, 20_000)]) for id in ids]
        if slow == "within one item":
            writes[2] = writes[2]._replace(parts=PassesAt(writes[2].parts, 1, deadline))
        results = tier.write(
            PassesAt(writes, 2, deadline) if slow == "between two items" else writes, deadline=deadline.at
        )
        statuses = [result.status for result in results]
        assert set(statuses) <= {Status.OK, Status.LATE}, f"{statuses}: not done in time is LATE"
        assert set(statuses[3:]) == {Status.LATE}, f"{statuses}: these were begun after the deadline"
        done = {id for id, status in zip(ids, statuses, strict=True) if status is Status.OK}
        for when in ("at once", "later"):
            present = {id for id, found in zip(ids, tier.contains(ids), strict=True) if found.status is Status.OK}
            assert done == present == {found.id for found in tier.scan()}, (
                f"{when}: OK are {sorted(id.depth for id in done)}, there are {sorted(id.depth for id in present)}"
            )
            assert all(get(tier, id, 30_000)[1] == b"".join(writes[id.depth].parts) for id in done)
            tier.flush()
            time.sleep(GRACE_S)
        assert tier.used_bytes() == sum(found.nbytes for found in tier.scan()), "what is LATE was counted as used"
        for id in ids:
            assert put(tier, id, pattern(id, 20_000)).status is Status.OK, "after a late write, none succeeds any more"

    @level(Level.FAULTS)
    def test_a_deadline_that_passes_during_a_call_ends_it(self, tier: Tier) -> None:
        ids = [object_id(number) for number in range(6)]
        for id in ids:
            put(tier, id, pattern(id, 100))
        buffers = [bytearray(b"?" * 100) for _ in ids]
        reads = [Read(id, [memoryview(b)], [Range(0, 100)]) for id, b in zip(ids, buffers, strict=True)]
        deadline = Deadline()
        results = tier.read_into(PassesAt(reads, 2, deadline), deadline=deadline.at)
        assert {result.status for result in results[3:]} == {Status.LATE}, "reads were begun after the deadline"
        for id, buffer, result in zip(ids, buffers, results, strict=True):
            assert result.status is not Status.OK or buffer == pattern(id, 100)
        deadline = Deadline()
        results = tier.contains(PassesAt(ids, 2, deadline), deadline=deadline.at)
        assert {result.status for result in results[3:]} == {Status.LATE}
        deadline = Deadline()
        results = tier.delete(PassesAt(ids, 2, deadline), deadline=deadline.at)
        assert {result.status for result in results[3:]} == {Status.LATE}
        kept = {id for id, result in zip(ids, results, strict=True) if result.status is Status.LATE}
        assert {found.id for found in tier.scan()} == kept, "what is LATE was deleted"

    @level(Level.FAULTS)
    @requires("damage")
    def test_an_emptied_object_counts_as_missing(self, tier: Tier, place: Path) -> None:
        self.raw_put(tier, place, object_id(0), b"")
        assert tier.contains([object_id(0)])[0].status is Status.MISSING
        assert get(tier, object_id(0), 10)[0].status is Status.MISSING
        assert object_id(0) not in {found.id for found in tier.scan()}
        assert put(tier, object_id(0), b"whole").nbytes == 5, "the lost object could not be written again"
        assert get(tier, object_id(0), 10)[1] == b"whole"

    @level(Level.FAULTS)
    @requires("damage")
    def test_reading_a_truncated_object_returns_only_the_remaining_bytes(self, tier: Tier, place: Path) -> None:
        put(tier, object_id(0), pattern("x", 10_000))
        self.raw_put(tier, place, object_id(0), pattern("x", 10_000)[:3000])
        buffer = bytearray(b"?" * 10_000)
        [result] = tier.read_into([Read(object_id(0), [memoryview(buffer)], [Range(0, 10_000)])])
        assert result.status is not Status.OK or result.nbytes == 3000, "more bytes were reported than are stored"
        assert bytes(buffer[result.nbytes :]) == b"?" * (10_000 - result.nbytes), (
            "the buffer was written past the object's end"
        )

    @level(Level.FAULTS)
    @requires("raw", "damage")
    def test_damaged_bytes_are_returned_unchanged_or_refused(self, tier: Tier, place: Path) -> None:
        """A tier may verify its data but need not: the layer above verifies every byte. It must not invent bytes."""
        put(tier, object_id(0))
        data = bytearray(self.raw_get(tier, place, object_id(0)) or b"")
        data[len(data) // 2] ^= 16
        self.raw_put(tier, place, object_id(0), bytes(data))
        result, back = get(tier, object_id(0), len(data))
        assert result.status is not Status.OK or back == data

    @level(Level.FAULTS)
    @requires("full_device")
    def test_a_full_device_is_reported_and_recovered_from(self, tier: Tier, place: Path) -> None:
        put(tier, object_id(0), pattern(0, 5000))
        used = tier.used_bytes()
        with self.full_device(place):
            for number in range(1, 5):
                status = put(tier, object_id(number), pattern(number, 5000)).status
                assert status is Status.FULL, f"there is no space left, but the write returned {status.name}"
                assert tier.contains([object_id(number)])[0].status is Status.MISSING
            assert get(tier, object_id(0), 5000)[1] == pattern(0, 5000), "an existing object is no longer served"
            assert tier.used_bytes() == used, "failed writes were counted as used bytes"
            if self.capabilities.raw:
                assert len(self.raw_files(tier, place)) == 1, "failed writes left files behind"
        until = time.monotonic() + self.patience
        while (status := put(tier, object_id(9), pattern(9, 5000)).status) is not Status.OK:
            assert status is Status.FULL
            assert time.monotonic() < until, "there is space again, but no write succeeds"
            time.sleep(0.02)
        assert get(tier, object_id(9), 5000)[1] == pattern(9, 5000)
        assert tier.used_bytes() == used + 5000

    @level(Level.FAULTS)
    def test_after_close_calls_fail_and_close_may_be_repeated(self, tier: Tier) -> None:
        put(tier, object_id(0), b"x")
        tier.close()
        tier.close()
        assert put(tier, object_id(1), b"x").status is Status.FAILED
        assert get(tier, object_id(0), 1)[0].status is Status.FAILED
        assert tier.contains([object_id(0)])[0].status is Status.FAILED
        assert tier.delete([object_id(0)])[0].status is Status.FAILED

    # ---------------------------------------------------------------- pressure

    @level(Level.PRESSURE)
    @requires("bounded")
    def test_an_object_above_the_capacity_is_refused_and_the_rest_still_works(self, place: Path) -> None:
        tier = self.open_tier(place, 100_000)
        try:
            assert put(tier, object_id(0), bytes(100_001)).status is Status.FULL
            assert tier.contains([object_id(0)])[0].status is Status.MISSING
            assert put(tier, object_id(1), bytes(50_000)).status is Status.OK
            assert tier.used_bytes() == 50_000
        finally:
            tier.close()

    @level(Level.PRESSURE)
    @requires("bounded")
    def test_the_capacity_is_never_exceeded_and_new_objects_replace_old_ones(self, place: Path) -> None:
        tier = self.open_tier(place, 100_000)
        try:
            stored = 0
            for number in range(60):
                status = put(tier, object_id(number), pattern(number, 7000)).status
                assert status in (Status.OK, Status.FULL)
                stored += status is Status.OK
                held = sum(found.nbytes for found in tier.scan())
                assert held <= 100_000, f"{held} bytes are stored; 100000 are allowed"
                if self.capabilities.raw:
                    # Objects being evicted may still have files, hence the factor 2: it allows them, but no growth.
                    assert len(self.raw_files(tier, place)) <= 2 * 100_000 // 7000
            assert stored >= 30, f"only {stored} of 60 writes were accepted"
            assert len(list(tier.scan())) >= 10, "far more was evicted than necessary"
            for found in tier.scan():
                assert get(tier, found.id, 7000)[1] == pattern(found.id.depth, 7000)
        finally:
            tier.close()

    @level(Level.PRESSURE)
    @requires("bounded", "persistent")
    def test_objects_of_earlier_runs_count_against_the_capacity(self, place: Path) -> None:
        for life in range(4):
            tier = self.open_tier(place, 100_000)
            for number in range(8):
                put(tier, object_id(100 * life + number), pattern(number, 7000))
            held = sum(found.nbytes for found in tier.scan())
            assert held <= 100_000, f"opened {life + 1} times: {held} bytes are stored; 100000 are allowed"
            tier.close()

    # ---------------------------------------------------------------- restart

    @level(Level.RESTART)
    def test_flush_returns(self, tier: Tier) -> None:
        tier.flush()
        put(tier, object_id(0), b"x")
        tier.flush()
        tier.flush(durable=True)
        tier.flush(durable=True)
        assert get(tier, object_id(0), 1)[1] == b"x"

    @level(Level.RESTART)
    @requires("persistent")
    def test_objects_are_there_after_reopening(self, place: Path) -> None:
        tier = self.open_tier(place, None)
        for number in range(5):
            put(tier, object_id(number), pattern(number, 500))
        tier.close()
        tier = self.open_tier(place, None)
        try:
            assert {found.id for found in tier.scan()} == {object_id(number) for number in range(5)}
            assert tier.used_bytes() == 2500
            assert [get(tier, object_id(n), 500)[1] for n in range(5)] == [pattern(n, 500) for n in range(5)]
        finally:
            tier.close()

    # ---------------------------------------------------------------- concurrency

    @level(Level.CONCURRENCY)
    @requires("shared")
    def test_two_openers_of_one_place_see_each_others_objects_and_clears(self, place: Path) -> None:
        one, other = self.open_tier(place, None), self.open_tier(place, None)
        try:
            assert one.shared
            put(one, object_id(0), b"x")
            assert other.contains([object_id(0)])[0].status is Status.OK
            assert get(other, object_id(0), 1)[1] == b"x"
            assert put(other, object_id(0), b"y").nbytes == 0, "a second opener replaced an existing object"
            assert other.used_bytes() == one.used_bytes() == 1
            assert other.clear() == 1
            assert get(one, object_id(0), 1)[0].status is Status.MISSING
            assert one.used_bytes() == 0
        finally:
            one.close()
            other.close()

    @level(Level.CONCURRENCY)
    @requires("shared", "bounded")
    def test_openers_of_one_place_share_its_capacity(self, place: Path) -> None:
        openers = [self.open_tier(place, 100_000) for _ in range(2)]
        try:
            for number in range(40):
                put(openers[number % 2], object_id(number), pattern(number, 7000))
                assert sum(found.nbytes for found in openers[0].scan()) <= 100_000
        finally:
            for tier in openers:
                tier.close()

    @level(Level.CONCURRENCY)
    def test_concurrent_threads_see_only_whole_objects(self, tier: Tier) -> None:
        ids = [object_id(number) for number in range(4)]
        wrong: list[Any] = []

        def work(seed: int) -> None:
            for step in range(60):
                id = ids[(seed + step) % len(ids)]
                outcome = put(tier, id, pattern(id, 20_000)).status
                result, data = get(tier, id, 20_000)
                if outcome is not Status.OK or result.status not in (Status.OK, Status.MISSING):
                    wrong.append((outcome, result))
                elif result.status is Status.OK and data != pattern(id, 20_000):
                    wrong.append(f"{len(data)} bytes that are not those of chunk {id.depth}")
                if step % 5 == seed:
                    tier.delete([id])

        _in_threads(work, 4)
        assert not wrong
        assert tier.used_bytes() == sum(found.nbytes for found in tier.scan())

    # ---------------------------------------------------------------- another process

    @level(Level.RESTART)
    @requires("persistent")
    def test_another_process_finds_every_object_under_its_id(self, place: Path) -> None:
        """Names in storage must not depend on the process: its hash seed, addresses or counters."""
        tier = self.open_tier(place, None)
        for number in range(5):
            put(tier, object_id(number), pattern(number, 500))
        tier.flush()
        tier.close()
        found, wrong = in_new_process(self, "look", str(place), 5)
        assert found == 5, f"another process finds {found} of 5 objects"
        assert not wrong, f"another process reads wrong bytes of chunks {wrong}"

    def look(self, place: str, count: int) -> tuple[int, list[int]]:
        """Returns how many of the first `count` objects exist, and which are wrong. Runs in another process."""
        tier = self.open_tier(Path(place), None)
        try:
            present = [n for n in range(count) if tier.contains([object_id(n)])[0].status is Status.OK]
            return len(present), [n for n in present if get(tier, object_id(n), 500)[1] != pattern(n, 500)]
        finally:
            tier.close()

    # ---------------------------------------------------------------- random histories

    @level(Level.CONCURRENCY)
    def test_any_sequence_of_calls_does_what_a_dict_would(self, place: Path) -> None:
        self._histories(place, lambda open_tier: TierMachine(open_tier, persistent=self.capabilities.persistent))

    @level(Level.CONCURRENCY)
    @requires("shared")
    def test_any_sequence_of_calls_of_two_openers_does_what_a_dict_would(self, place: Path) -> None:
        persistent = self.capabilities.persistent
        self._histories(place, lambda open_tier: TierMachine(open_tier, persistent=persistent, openers=2))

    @level(Level.PRESSURE)
    @requires("bounded")
    def test_any_sequence_of_calls_stays_within_bounds_and_serves_what_was_written(self, place: Path) -> None:
        def machine(open_tier: Callable[[], Tier]) -> BoundedTierMachine:
            return BoundedTierMachine(open_tier, capacity=100_000, persistent=self.capabilities.persistent)

        self._histories(place, machine, capacity=100_000)

    def _histories(
        self,
        place: Path,
        machine: Callable[[Callable[[], Tier]], RuleBasedStateMachine],
        capacity: int | None = None,
    ) -> None:
        """Runs random histories, each in its own folder."""
        places = iter(range(10**6))

        def fresh() -> RuleBasedStateMachine:
            folder = place / str(next(places))
            folder.mkdir()
            return machine(lambda: self.open_tier(folder, capacity))

        run_machine(fresh, examples=self.machine_examples, steps=30)


def _in_threads(work: Callable[[int], None], count: int, timeout: float = 120.0) -> None:
    """Runs `work(0 … count − 1)` concurrently. pytest itself fails the test if a thread raises."""
    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), f"a thread has not ended after {timeout:g} s"
