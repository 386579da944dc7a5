"""What every tier must do, as tests. Subclass `TierTests`, say how to open your tier, and run pytest:

    class TestMyTier(TierTests):
        capabilities = TierCapabilities(persistent=True, bounded=True)

        def open_tier(self, place, capacity):
            return MyTier(place, capacity)

The suite knows nothing of how a tier works; what a tier can't do it does not claim, and the tests that need it are skipped
with that reason. Where you offer a way around the tier (`raw_get`, `raw_put`, `raw_files`), the suite uses it as its oracle.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lmcache.errors import FormatError
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import Rect
from lmcache.tiers.base import Found, Range, Read, Tier, Write
from lmcache_conformance.contract import Level
from lmcache_conformance.elsewhere import elsewhere
from lmcache_conformance.machine import TierMachine, run_machine
from lmcache_conformance.marks import level, requires
from lmcache_conformance.tierlab import (
    FORM,
    NAMESPACE,
    OTHER_NAMESPACE,
    get,
    load,
    object_id,
    pattern,
    payload_of,
    put,
    stored_form,
)


class TierCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier claims. What it does not claim is skipped; what it claims must pass.

    Attributes:
        persistent: objects survive `close` and are there when the same place is opened again, in any process.
        bounded: `open_tier` honours `capacity`.
        shared: several openers of one place (in one or more processes) see each other's objects at once.
        raw: `raw_get` and `raw_files` reach what is stored without the tier.
        damage: so does `raw_put`: bytes can be lost or changed behind the tier's back.
        full_device: `full_device` makes the medium refuse writes for lack of space.
    """

    persistent: bool = False
    bounded: bool = False
    shared: bool = False
    raw: bool = False
    damage: bool = False
    full_device: bool = False


class TierTests:
    """The contract of `lmcache.tiers.base.Tier`."""

    capabilities: TierCapabilities = TierCapabilities()
    machine_examples: int = 20
    """How many random histories the state machine tries."""

    patience: float = 60.0
    """Seconds after which a tier that still refuses writes, though there is space again, counts as stuck."""

    # ---------------------------------------------------------------- what a subclass says

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """Open the tier at `place`, an empty folder that is the same in each call of one test.

        `capacity`: at most so many bytes, None = no limit.
        """
        raise NotImplementedError

    def raw_get(self, tier: Tier, place: Path, id: ObjectId) -> bytes | None:
        """What is really stored under `id`, read without the tier."""
        raise NotImplementedError

    def raw_put(self, tier: Tier, place: Path, id: ObjectId, data: bytes) -> None:
        """Put `data` where the tier would look for `id`, replacing what is there, without the tier."""
        raise NotImplementedError

    def raw_files(self, tier: Tier, place: Path) -> Sequence[str]:
        """Names of everything that holds object bytes, finished or not, listed without the tier."""
        raise NotImplementedError

    def full_device(self, place: Path) -> AbstractContextManager[None]:
        """While it is entered, the medium has no space left, for whatever reason the tier itself can't foresee."""
        raise NotImplementedError

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """Where the tier may keep things: in memory where the host has such a folder, for this is about *what* it does."""
        base = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="lmcache-tier-", dir=base if base.is_dir() else None))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    @pytest.fixture
    def tier(self, place: Path) -> Iterator[Tier]:
        """The tier, open."""
        tier = self.open_tier(place, None)
        yield tier
        tier.close()

    # ---------------------------------------------------------------- bytes: what goes in comes out

    @level(Level.BYTES)
    def test_it_fulfils_the_protocol(self, tier: Tier) -> None:
        assert isinstance(tier, Tier)
        assert tier.name
        assert isinstance(tier.shared, bool)

    @level(Level.BYTES)
    @pytest.mark.parametrize("sizes", [(1,), (4096,), (12288, 100_003, 7), (1, 0, 2), tuple(range(1, 60))])
    def test_what_was_written_is_read_back_bit_for_bit(self, tier: Tier, sizes: tuple[int, ...]) -> None:
        parts = [pattern(i, size) for i, size in enumerate(sizes)]
        [result] = tier.write([Write(object_id(0), [memoryview(part) for part in parts])])
        assert result == (Status.OK, sum(sizes), "")
        result, data = get(tier, object_id(0), sum(sizes))
        assert result.status is Status.OK
        assert data == b"".join(parts)

    @level(Level.BYTES)
    def test_an_object_of_many_megabytes_survives(self, tier: Tier) -> None:
        data = pattern("big", 1 << 20) * 33
        assert put(tier, object_id(0), data).status is Status.OK
        result, back = get(tier, object_id(0), len(data))
        assert (result.status, back == data) == (Status.OK, True)

    @level(Level.BYTES)
    def test_ranges_fill_their_own_buffers(self, tier: Tier) -> None:
        data = pattern("x", 10_000)
        put(tier, object_id(0), data)
        ranges = [Range(0, 100), Range(100, 1), Range(5000, 3000), Range(0, 10), Range(8000, 2000), Range(50, 0)]
        buffers = [bytearray(r.length) for r in ranges]
        [result] = tier.read_into([Read(object_id(0), [memoryview(b) for b in buffers], ranges)])
        assert result == (Status.OK, sum(r.length for r in ranges), "")
        assert buffers == [data[r.offset : r.offset + r.length] for r in ranges]

    @level(Level.BYTES)
    def test_more_ranges_than_one_system_call_takes_are_all_filled(self, tier: Tier) -> None:
        data = pattern("x", 9000)
        put(tier, object_id(0), data)
        buffers = [bytearray(3) for _ in range(3000)]
        [result] = tier.read_into(
            [Read(object_id(0), [memoryview(b) for b in buffers], [Range(3 * i, 3) for i in range(3000)])]
        )
        assert result.nbytes == 9000
        assert b"".join(buffers) == data

    @level(Level.BYTES)
    def test_a_range_past_the_end_tells_how_much_there_was(self, tier: Tier) -> None:
        data = pattern("x", 1000)
        put(tier, object_id(0), data)
        buffers = [bytearray(b"?" * 600), bytearray(b"?" * 600), bytearray(b"?" * 10)]
        ranges = [Range(0, 600), Range(600, 600), Range(5000, 10)]
        [result] = tier.read_into([Read(object_id(0), [memoryview(b) for b in buffers], ranges)])
        assert result == (Status.OK, 1000, "")
        assert bytes(buffers[0]) + bytes(buffers[1][:400]) == data
        assert bytes(buffers[1][400:]) == b"?" * 200
        assert bytes(buffers[2]) == b"?" * 10

    @level(Level.BYTES)
    def test_a_missing_object_leaves_the_buffer_alone(self, tier: Tier) -> None:
        buffer = bytearray(b"?" * 100)
        [result] = tier.read_into([Read(object_id(0), [memoryview(buffer)], [Range(0, 100)])])
        assert result.status is Status.MISSING
        assert bytes(buffer) == b"?" * 100

    @level(Level.BYTES)
    def test_no_reference_to_a_written_buffer_is_kept(self, tier: Tier) -> None:
        buffer = bytearray(pattern("x", 5000))
        tier.write([Write(object_id(0), [memoryview(buffer)])])
        buffer[:] = bytes(5000)
        assert get(tier, object_id(0), 5000)[1] == pattern("x", 5000)
        buffer.extend(b"a memoryview that is still alive forbids this")

    @level(Level.BYTES)
    @requires("raw")
    def test_what_was_written_lies_there_unchanged(self, tier: Tier, place: Path) -> None:
        for number in range(3):
            put(tier, object_id(number))
        tier.flush()
        for number in range(3):
            assert self.raw_get(tier, place, object_id(number)) == stored_form(object_id(number)) or (
                # the write id in the header differs from write to write; the payload does not
                (self.raw_get(tier, place, object_id(number)) or b"")[FORM.payload_offset :]
                == stored_form(object_id(number))[FORM.payload_offset :]
            )
        assert self.raw_get(tier, place, object_id(3)) is None

    # ---------------------------------------------------------------- keys: ids never mix

    @level(Level.KEYS)
    def test_ids_that_differ_in_one_field_are_different_objects(self, tier: Tier) -> None:
        base = object_id(1)
        ids = [
            base,
            base._replace(namespace=OTHER_NAMESPACE),
            base._replace(chain=object_id(2).chain),
            base._replace(chain=base.chain[:-1] + bytes([base.chain[-1] ^ 1])),
            base._replace(chain=bytes([base.chain[0] ^ 1]) + base.chain[1:]),
            base._replace(group=1),
            base._replace(rect=Rect((0, 1), (0, 2))),
            base._replace(rect=Rect((0, 2), (0, 1))),
            base._replace(rect=Rect((0, 2), (1, 2))),
            base._replace(tokens=8),
            base._replace(depth=11),
        ]
        for number, id in enumerate(ids):
            assert tier.contains([id])[0].status is Status.MISSING, f"{id} is another object than those before"
            assert put(tier, id, pattern(number, 64)).nbytes == 64
        assert [get(tier, id, 64)[1] for id in ids] == [pattern(number, 64) for number in range(len(ids))]
        assert {found.id for found in tier.scan()} == set(ids)

    @level(Level.KEYS)
    def test_what_is_served_under_an_id_is_that_object(self, tier: Tier) -> None:
        """Right stored forms name themselves: a tier that confuses two requests is found by whoever reads them."""
        ids = [object_id(number) for number in range(12)]
        for id in ids:
            assert put(tier, id).status is Status.OK
        for id in (*ids, *reversed(ids)):
            self._serves(tier, id)

    def _serves(self, tier: Tier, id: ObjectId) -> None:
        try:
            payload = load(tier, id)
        except FormatError as error:
            raise AssertionError(f"what is served as chunk {id.depth} is not that object: {error}") from None
        assert payload is not None, f"chunk {id.depth} was written, and is not there"
        assert payload == payload_of(id)

    @level(Level.KEYS)
    def test_the_first_write_wins(self, tier: Tier) -> None:
        put(tier, object_id(0), b"first")
        assert put(tier, object_id(0), b"second") == (Status.OK, 0, "")
        assert get(tier, object_id(0), 10)[1] == b"first"

    @level(Level.KEYS)
    def test_one_missing_item_does_not_disturb_the_others(self, tier: Tier) -> None:
        for number in (0, 2):
            put(tier, object_id(number), pattern(number, 100))
        ids = [object_id(number) for number in range(3)]
        expected = [Status.OK, Status.MISSING, Status.OK]
        assert [r.status for r in tier.contains(ids)] == expected
        buffers = [bytearray(100) for _ in ids]
        reads = [Read(id, [memoryview(b)], [Range(0, 100)]) for id, b in zip(ids, buffers, strict=True)]
        assert [r.status for r in tier.read_into(reads)] == expected
        assert buffers == [pattern(0, 100), bytes(100), pattern(2, 100)]

    @level(Level.KEYS)
    def test_an_empty_batch_has_an_empty_answer(self, tier: Tier) -> None:
        assert tier.contains([]) == tier.read_into([]) == tier.write([]) == tier.delete([]) == []

    # ---------------------------------------------------------------- reset: removal, listing, accounting

    @level(Level.RESET)
    def test_what_is_deleted_is_gone_and_may_be_written_anew(self, tier: Tier) -> None:
        put(tier, object_id(0), b"first")
        assert [r.status for r in tier.delete([object_id(0), object_id(1), object_id(0)])] == [Status.OK] * 3
        assert tier.contains([object_id(0)])[0].status is Status.MISSING
        assert get(tier, object_id(0), 5)[0].status is Status.MISSING
        put(tier, object_id(0), b"second")
        assert get(tier, object_id(0), 10)[1] == b"second"

    @level(Level.RESET)
    def test_clear_removes_one_namespace_and_counts(self, tier: Tier) -> None:
        for number in range(4):
            put(tier, object_id(number), b"x")
        put(tier, object_id(0, namespace=OTHER_NAMESPACE), b"y")
        assert tier.clear(NAMESPACE) == 4
        for number in range(4):
            assert get(tier, object_id(number), 1)[0].status is Status.MISSING, "served after it was cleared"
        assert list(tier.scan()) == [Found(object_id(0, namespace=OTHER_NAMESPACE), 1)]
        assert {r.status for r in tier.contains([object_id(number) for number in range(4)])} == {Status.MISSING}
        assert tier.clear() == 1
        assert list(tier.scan()) == []
        assert tier.clear() == 0
        assert put(tier, object_id(0), b"z").nbytes == 1

    @level(Level.RESET)
    @requires("raw")
    def test_after_clear_and_delete_nothing_is_left_behind(self, tier: Tier, place: Path) -> None:
        for number in range(4):
            put(tier, object_id(number))
        assert len(self.raw_files(tier, place)) == 4
        tier.delete([object_id(0)])
        assert len(self.raw_files(tier, place)) == 3
        tier.clear()
        assert not self.raw_files(tier, place)

    @level(Level.RESET)
    def test_scan_and_used_bytes_know_every_object(self, tier: Tier) -> None:
        sizes = {object_id(number): 100 * number + 1 for number in range(10)}
        for id, size in sizes.items():
            put(tier, id, bytes(size))
        assert {found.id: found.nbytes for found in tier.scan()} == sizes
        assert tier.used_bytes() == sum(sizes.values())
        tier.delete([object_id(3), object_id(99)])
        assert tier.used_bytes() == sum(sizes.values()) - 301
        put(tier, object_id(4), bytes(5000))  # kept, not replaced
        assert tier.used_bytes() == sum(sizes.values()) - 301

    @level(Level.RESET)
    def test_contains_and_scan_change_nothing(self, tier: Tier) -> None:
        put(tier, object_id(0), b"x")
        before = tier.used_bytes()
        for _ in range(3):
            tier.contains([object_id(0), object_id(1)])
            list(tier.scan())
        assert tier.used_bytes() == before
        assert get(tier, object_id(0), 1)[1] == b"x"

    # ---------------------------------------------------------------- faults

    @level(Level.FAULTS)
    def test_an_object_without_bytes_is_refused(self, tier: Tier) -> None:
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
        """Whatever a write says, a reader finds all of the object or none of it, and the next write may succeed."""
        refused = [
            tier.write([Write(object_id(0), [b"late"])], deadline=time.monotonic() - 1)[0].status,
            put(tier, object_id(1), b"").status,
        ]
        assert Status.OK not in refused
        for number in range(2):
            assert tier.contains([object_id(number)])[0].status is Status.MISSING, "a store that failed is visible"
            assert get(tier, object_id(number), 10)[0].status is Status.MISSING
            assert put(tier, object_id(number), b"whole").nbytes == 5
            assert get(tier, object_id(number), 10)[1] == b"whole"

    @level(Level.FAULTS)
    @requires("damage")
    def test_a_stored_object_that_was_emptied_is_not_there(self, tier: Tier, place: Path) -> None:
        self.raw_put(tier, place, object_id(0), b"")
        assert tier.contains([object_id(0)])[0].status is Status.MISSING
        assert get(tier, object_id(0), 10)[0].status is Status.MISSING
        assert object_id(0) not in {found.id for found in tier.scan()}
        assert put(tier, object_id(0), b"whole").nbytes == 5, "what was lost may be written anew"
        assert get(tier, object_id(0), 10)[1] == b"whole"

    @level(Level.FAULTS)
    @requires("damage")
    def test_of_a_truncated_object_only_what_is_there_is_read(self, tier: Tier, place: Path) -> None:
        put(tier, object_id(0), pattern("x", 10_000))
        self.raw_put(tier, place, object_id(0), pattern("x", 10_000)[:3000])
        buffer = bytearray(b"?" * 10_000)
        [result] = tier.read_into([Read(object_id(0), [memoryview(buffer)], [Range(0, 10_000)])])
        assert result.status is not Status.OK or result.nbytes == 3000, "more is reported than there is"
        assert bytes(buffer[result.nbytes :]) == b"?" * (10_000 - result.nbytes), "bytes from nowhere"

    @level(Level.FAULTS)
    @requires("raw", "damage")
    def test_damage_is_shown_as_it_is_or_refused(self, tier: Tier, place: Path) -> None:
        """A tier may check what it holds; what it must not do is to make up bytes: the layer above checks every one."""
        put(tier, object_id(0))
        data = bytearray(self.raw_get(tier, place, object_id(0)) or b"")
        data[len(data) // 2] ^= 16
        self.raw_put(tier, place, object_id(0), bytes(data))
        result, back = get(tier, object_id(0), len(data))
        assert result.status is not Status.OK or back == data

    @level(Level.FAULTS)
    @requires("full_device")
    def test_a_full_device_is_said_costs_nothing_and_is_recovered_from(self, tier: Tier, place: Path) -> None:
        put(tier, object_id(0), pattern(0, 5000))
        used = tier.used_bytes()
        with self.full_device(place):
            for number in range(1, 5):
                status = put(tier, object_id(number), pattern(number, 5000)).status
                assert status is Status.FULL, f"no space left, and the write says {status.name}"
                assert tier.contains([object_id(number)])[0].status is Status.MISSING
            assert get(tier, object_id(0), 5000)[1] == pattern(0, 5000), "what is there is still served"
            assert tier.used_bytes() == used, "phantom usage"
            if self.capabilities.raw:
                assert len(self.raw_files(tier, place)) == 1, "failed writes leave files behind"
        until = time.monotonic() + self.patience
        while (status := put(tier, object_id(9), pattern(9, 5000)).status) is not Status.OK:
            assert status is Status.FULL
            assert time.monotonic() < until, "there is space again, and no write succeeds"
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
                assert held <= 100_000, f"{held} bytes are held, 100000 are allowed"
                if self.capabilities.raw:
                    # What is being evicted this moment may be counted once more, hence twice; growth is what must not be.
                    assert len(self.raw_files(tier, place)) <= 2 * 100_000 // 7000
            assert stored >= 30, "hardly anything was taken"
            assert len(list(tier.scan())) >= 10, "far more was evicted than needed"
            for found in tier.scan():
                assert get(tier, found.id, 7000)[1] == pattern(found.id.depth, 7000)
        finally:
            tier.close()

    @level(Level.PRESSURE)
    @requires("bounded", "persistent")
    def test_what_an_earlier_life_left_counts_against_the_capacity(self, place: Path) -> None:
        for life in range(4):
            tier = self.open_tier(place, 100_000)
            for number in range(8):
                put(tier, object_id(100 * life + number), pattern(number, 7000))
            held = sum(found.nbytes for found in tier.scan())
            assert held <= 100_000, f"life {life}: {held} bytes are held, 100000 are allowed"
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
            assert put(other, object_id(0), b"y").nbytes == 0, "the first write wins, whoever wrote"
            assert other.used_bytes() == one.used_bytes() == 1
            assert other.clear() == 1
            assert get(one, object_id(0), 1)[0].status is Status.MISSING
            assert one.used_bytes() == 0
        finally:
            one.close()
            other.close()

    @level(Level.CONCURRENCY)
    @requires("shared", "bounded")
    def test_openers_of_one_place_keep_its_capacity_together(self, place: Path) -> None:
        openers = [self.open_tier(place, 100_000) for _ in range(2)]
        try:
            for number in range(40):
                put(openers[number % 2], object_id(number), pattern(number, 7000))
                assert sum(found.nbytes for found in openers[0].scan()) <= 100_000
        finally:
            for tier in openers:
                tier.close()

    @level(Level.CONCURRENCY)
    def test_threads_that_write_read_and_delete_the_same_objects_see_whole_ones(self, tier: Tier) -> None:
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
                    wrong.append(f"{len(data)} bytes, not those of {id.depth}")
                if step % 5 == seed:
                    tier.delete([id])

        _in_threads(work, 4)
        assert not wrong
        assert tier.used_bytes() == sum(found.nbytes for found in tier.scan())

    # ---------------------------------------------------------------- another process

    @level(Level.RESTART)
    @requires("persistent")
    def test_another_process_finds_every_object_under_its_id(self, place: Path) -> None:
        """Names must not depend on the process: hash seeds, addresses, counters."""
        tier = self.open_tier(place, None)
        for number in range(5):
            put(tier, object_id(number), pattern(number, 500))
        tier.flush()
        tier.close()
        found, wrong = elsewhere(self, "look", str(place), 5)
        assert found == 5, f"another process sees {found} of 5 objects"
        assert not wrong, f"another process reads other bytes of chunks {wrong}"

    def look(self, place: str, count: int) -> tuple[int, list[int]]:
        """How many of the first objects are there, and which of them are wrong. Runs in another process."""
        tier = self.open_tier(Path(place), None)
        try:
            present = [n for n in range(count) if tier.contains([object_id(n)])[0].status is Status.OK]
            return len(present), [n for n in present if get(tier, object_id(n), 500)[1] != pattern(n, 500)]
        finally:
            tier.close()

    # ---------------------------------------------------------------- all of it at random

    @level(Level.CONCURRENCY)
    def test_any_sequence_of_calls_does_what_a_dict_would(self, place: Path) -> None:
        places = iter(range(10**6))

        def machine() -> TierMachine:
            folder = place / str(next(places))
            folder.mkdir()
            return TierMachine(lambda: self.open_tier(folder, None), persistent=self.capabilities.persistent)

        run_machine(machine, examples=self.machine_examples, steps=30)


def _in_threads(work: Callable[[int], None], count: int, timeout: float = 120.0) -> None:
    """`work(0 … count − 1)` at once. A thread that raises fails the test by pytest's own check."""
    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), f"a thread still hangs after {timeout:g} s"
