"""What every tier must do, as tests. Subclass `TierTests`, say how to open your tier, and run pytest:

    class TestMyTier(TierTests):
        def open_tier(self, place, capacity):
            return MyTier(place, capacity)

The suite knows nothing of how a tier works; what a tier can't do, it says in the class attributes, and the tests that
need it are skipped with that reason.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tierlab import NAMESPACE, OTHER_NAMESPACE, get, object_id, pattern, put

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import Rect
from lmcache.tiers.base import Found, Range, Read, Tier, Write


class TierTests:
    """The contract of `lmcache.tiers.base.Tier`. Attributes say what the tier under test is."""

    persistent: bool = True
    """Objects survive `close` and are there when the same place is opened again."""

    bounded: bool = True
    """`open_tier` honours `capacity`."""

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """Open the tier at `place`, an empty folder that is the same in each call of one test."""
        raise NotImplementedError

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """Where the tier may keep things."""
        return tmp_path

    @pytest.fixture
    def tier(self, place: Path) -> Iterator[Tier]:
        tier = self.open_tier(place, None)
        yield tier
        tier.close()

    # ---------------------------------------------------------------- what goes in comes out

    def test_it_fulfils_the_protocol(self, tier: Tier) -> None:
        assert isinstance(tier, Tier)
        assert tier.name
        assert isinstance(tier.shared, bool)

    @pytest.mark.parametrize("sizes", [(1,), (4096,), (12288, 100_003, 7), (1, 0, 2), tuple(range(1, 60))])
    def test_what_was_written_is_read_back_bit_for_bit(self, tier: Tier, sizes: tuple[int, ...]) -> None:
        parts = [pattern(i, size) for i, size in enumerate(sizes)]
        [result] = tier.write([Write(object_id(0), [memoryview(part) for part in parts])])
        assert result == (Status.OK, sum(sizes), "")
        result, data = get(tier, object_id(0), sum(sizes))
        assert result.status is Status.OK
        assert data == b"".join(parts)

    def test_an_object_of_many_megabytes_survives(self, tier: Tier) -> None:
        data = pattern("big", 1 << 20) * 33
        assert put(tier, object_id(0), data).status is Status.OK
        result, back = get(tier, object_id(0), len(data))
        assert (result.status, back) == (Status.OK, data)

    def test_ranges_fill_their_own_buffers(self, tier: Tier) -> None:
        data = pattern("x", 10_000)
        put(tier, object_id(0), data)
        ranges = [Range(0, 100), Range(100, 1), Range(5000, 3000), Range(0, 10), Range(8000, 2000), Range(50, 0)]
        buffers = [bytearray(r.length) for r in ranges]
        [result] = tier.read_into([Read(object_id(0), [memoryview(b) for b in buffers], ranges)])
        assert result == (Status.OK, sum(r.length for r in ranges), "")
        assert buffers == [data[r.offset : r.offset + r.length] for r in ranges]

    def test_more_ranges_than_one_system_call_takes_are_all_filled(self, tier: Tier) -> None:
        data = pattern("x", 9000)
        put(tier, object_id(0), data)
        buffers = [bytearray(3) for _ in range(3000)]
        [result] = tier.read_into(
            [Read(object_id(0), [memoryview(b) for b in buffers], [Range(3 * i, 3) for i in range(3000)])]
        )
        assert result.nbytes == 9000
        assert b"".join(buffers) == data

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

    def test_a_missing_object_leaves_the_buffer_alone(self, tier: Tier) -> None:
        buffer = bytearray(b"?" * 100)
        [result] = tier.read_into([Read(object_id(0), [memoryview(buffer)], [Range(0, 100)])])
        assert result.status is Status.MISSING
        assert bytes(buffer) == b"?" * 100

    def test_no_reference_to_a_written_buffer_is_kept(self, tier: Tier) -> None:
        buffer = bytearray(pattern("x", 5000))
        tier.write([Write(object_id(0), [memoryview(buffer)])])
        buffer[:] = bytes(5000)
        assert get(tier, object_id(0), 5000)[1] == pattern("x", 5000)
        buffer.extend(b"a memoryview that is still alive forbids this")

    # ---------------------------------------------------------------- names

    def test_ids_that_differ_in_one_field_are_different_objects(self, tier: Tier) -> None:
        base = object_id(1)
        ids = [
            base,
            base._replace(namespace=OTHER_NAMESPACE),
            base._replace(chain=object_id(2).chain),
            base._replace(group=1),
            base._replace(rect=Rect((0, 1), (0, 2))),
            base._replace(rect=Rect((0, 2), (0, 1))),
            base._replace(rect=Rect((0, 2), (1, 2))),
            base._replace(tokens=8),
            base._replace(depth=11),
        ]
        for number, id in enumerate(ids):
            assert tier.contains([id])[0].status is Status.MISSING
            assert put(tier, id, pattern(number, 64)).nbytes == 64
        assert [get(tier, id, 64)[1] for id in ids] == [pattern(number, 64) for number in range(len(ids))]
        assert {found.id for found in tier.scan()} == set(ids)

    def test_the_first_write_wins(self, tier: Tier) -> None:
        put(tier, object_id(0), b"first")
        assert put(tier, object_id(0), b"second") == (Status.OK, 0, "")
        assert get(tier, object_id(0), 10)[1] == b"first"

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

    def test_an_empty_batch_has_an_empty_answer(self, tier: Tier) -> None:
        assert tier.contains([]) == tier.read_into([]) == tier.write([]) == tier.delete([]) == []

    def test_an_object_without_bytes_is_refused(self, tier: Tier) -> None:
        assert put(tier, object_id(0), b"").status is Status.FAILED
        assert tier.contains([object_id(0)])[0].status is Status.MISSING

    # ---------------------------------------------------------------- removal, listing, accounting

    def test_what_is_deleted_is_gone_and_may_be_written_anew(self, tier: Tier) -> None:
        put(tier, object_id(0), b"first")
        assert [r.status for r in tier.delete([object_id(0), object_id(1), object_id(0)])] == [Status.OK] * 3
        assert tier.contains([object_id(0)])[0].status is Status.MISSING
        assert get(tier, object_id(0), 5)[0].status is Status.MISSING
        put(tier, object_id(0), b"second")
        assert get(tier, object_id(0), 10)[1] == b"second"

    def test_clear_removes_one_namespace_and_counts(self, tier: Tier) -> None:
        for number in range(4):
            put(tier, object_id(number), b"x")
        put(tier, object_id(0, namespace=OTHER_NAMESPACE), b"y")
        assert tier.clear(NAMESPACE) == 4
        assert list(tier.scan()) == [Found(object_id(0, namespace=OTHER_NAMESPACE), 1)]
        assert {r.status for r in tier.contains([object_id(number) for number in range(4)])} == {Status.MISSING}
        assert tier.clear() == 1
        assert list(tier.scan()) == []
        assert tier.clear() == 0
        assert put(tier, object_id(0), b"z").nbytes == 1

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

    def test_contains_and_scan_change_nothing(self, tier: Tier) -> None:
        put(tier, object_id(0), b"x")
        before = tier.used_bytes()
        for _ in range(3):
            tier.contains([object_id(0), object_id(1)])
            list(tier.scan())
        assert tier.used_bytes() == before
        assert get(tier, object_id(0), 1)[1] == b"x"

    # ---------------------------------------------------------------- limits

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

    def test_a_deadline_in_the_future_does_not_matter(self, tier: Tier) -> None:
        future = time.monotonic() + 60
        assert tier.write([Write(object_id(0), [b"y"])], deadline=future)[0].status is Status.OK
        assert tier.contains([object_id(0)], deadline=future)[0].status is Status.OK

    def test_an_object_above_the_capacity_is_refused_and_the_rest_still_works(self, place: Path) -> None:
        tier = self._bounded(place, 100_000)
        try:
            assert put(tier, object_id(0), bytes(100_001)).status is Status.FULL
            assert tier.contains([object_id(0)])[0].status is Status.MISSING
            assert put(tier, object_id(1), bytes(50_000)).status is Status.OK
            assert tier.used_bytes() == 50_000
        finally:
            tier.close()

    def test_the_capacity_is_never_exceeded_and_new_objects_replace_old_ones(self, place: Path) -> None:
        tier = self._bounded(place, 100_000)
        try:
            stored = 0
            for number in range(60):
                status = put(tier, object_id(number), pattern(number, 7000)).status
                assert status in (Status.OK, Status.FULL)
                stored += status is Status.OK
                assert sum(found.nbytes for found in tier.scan()) <= 100_000
            assert stored >= 30, "hardly anything was taken"
            assert len(list(tier.scan())) >= 10, "far more was evicted than needed"
            for found in tier.scan():
                assert get(tier, found.id, 7000)[1] == pattern(found.id.depth, 7000)
        finally:
            tier.close()

    def _bounded(self, place: Path, capacity: int) -> Tier:
        if not self.bounded:
            pytest.skip("this tier has no capacity of its own")
        return self.open_tier(place, capacity)

    # ---------------------------------------------------------------- life and death

    def test_flush_returns(self, tier: Tier) -> None:
        tier.flush()
        put(tier, object_id(0), b"x")
        tier.flush()
        tier.flush(durable=True)
        tier.flush(durable=True)
        assert get(tier, object_id(0), 1)[1] == b"x"

    def test_after_close_calls_fail_and_close_may_be_repeated(self, tier: Tier) -> None:
        put(tier, object_id(0), b"x")
        tier.close()
        tier.close()
        assert put(tier, object_id(1), b"x").status is Status.FAILED
        assert get(tier, object_id(0), 1)[0].status is Status.FAILED
        assert tier.contains([object_id(0)])[0].status is Status.FAILED
        assert tier.delete([object_id(0)])[0].status is Status.FAILED

    def test_objects_are_there_after_reopening(self, place: Path) -> None:
        if not self.persistent:
            pytest.skip("this tier forgets everything when it is closed")
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

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert tier.used_bytes() == sum(found.nbytes for found in tier.scan())

    def test_any_sequence_of_calls_does_what_a_dict_would(self, place: Path) -> None:
        places = iter(range(10**6))

        def machine() -> TierMachine:
            folder = place / str(next(places))
            folder.mkdir()
            return TierMachine(lambda: self.open_tier(folder, None), self.persistent)

        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
        )


_IDS = st.builds(
    object_id,
    st.integers(0, 3),
    namespace=st.sampled_from([NAMESPACE, OTHER_NAMESPACE]),
    group=st.integers(0, 1),
    tokens=st.sampled_from([16, 160]),
)


class TierMachine(RuleBasedStateMachine):
    """A tier beside a dict."""

    def __init__(self, open_tier: Any, persistent: bool) -> None:
        super().__init__()
        self.open_tier = open_tier
        self.persistent = persistent
        self.model: dict[ObjectId, bytes] = {}

    @initialize()
    def open(self) -> None:
        self.tier: Tier = self.open_tier()

    @rule(id=_IDS, size=st.sampled_from([1, 100, 4096, 70_000]), seed=st.integers(0, 9))
    def write(self, id: ObjectId, size: int, seed: int) -> None:
        data = pattern(seed, size)
        expected = 0 if id in self.model else size
        assert put(self.tier, id, data) == (Status.OK, expected, "")
        self.model.setdefault(id, data)

    @rule(id=_IDS, offset=st.integers(0, 5000), length=st.integers(0, 5000))
    def read(self, id: ObjectId, offset: int, length: int) -> None:
        buffer = bytearray(b"?" * length)
        [result] = self.tier.read_into([Read(id, [memoryview(buffer)], [Range(offset, length)])])
        if id not in self.model:
            assert result.status is Status.MISSING
            return
        expected = self.model[id][offset : offset + length]
        assert result == (Status.OK, len(expected), "")
        assert bytes(buffer) == expected + b"?" * (length - len(expected))

    @rule(ids=st.lists(_IDS, max_size=3))
    def delete(self, ids: list[ObjectId]) -> None:
        assert all(result.status is Status.OK for result in self.tier.delete(ids))
        for id in ids:
            self.model.pop(id, None)

    @rule(namespace=st.sampled_from([None, NAMESPACE, OTHER_NAMESPACE]))
    def clear(self, namespace: bytes | None) -> None:
        doomed = [id for id in self.model if namespace in (None, id.namespace)]
        assert self.tier.clear(namespace) == len(doomed)
        for id in doomed:
            del self.model[id]

    @rule(durable=st.booleans())
    def flush(self, durable: bool) -> None:
        self.tier.flush(durable=durable)

    @rule()
    def reopen(self) -> None:
        if self.persistent:
            self.tier.close()
            self.tier = self.open_tier()

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "tier"):
            return
        assert {found.id: found.nbytes for found in self.tier.scan()} == {i: len(d) for i, d in self.model.items()}
        assert self.tier.used_bytes() == sum(map(len, self.model.values()))
        present = self.tier.contains(list(self.model))
        assert all(result.status is Status.OK for result in present)

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
