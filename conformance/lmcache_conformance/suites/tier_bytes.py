"""A tier without faults: bytes, keys (ids are never confused), reset (removal, listing, accounting)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.errors import FormatError
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import Rect
from lmcache.tiers.base import Found, Range, Read, Tier, Write
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.tier_objects import (
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
from lmcache_conformance.runner.marks import level, requires
from lmcache_conformance.suites.tier_factory import TierFactory


class TierBytesTests(TierFactory):
    """Bytes, keys, reset."""

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    def test_it_implements_the_protocol(self, tier: Tier) -> None:
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
        mib = pattern("big", (1 << 20) - 8)
        data = b"".join(number.to_bytes(8, "little") + mib for number in range(self.largest >> 20))
        assert put(tier, object_id(0), data).status is Status.OK
        assert [found.nbytes for found in tier.scan()] == [len(data)]
        result, back = get(tier, object_id(0), len(data))
        assert (result.status, result.nbytes) == (Status.OK, len(data)), (
            f"of {len(data)} bytes, {result.nbytes} came back"
        )
        assert back == data
        ends = [bytearray(100), bytearray(100)]
        ranges = [Range(len(data) - 100, 100), Range(len(data) // 2, 100)]
        tier.read_into([Read(object_id(0), [memoryview(end) for end in ends], ranges)])
        assert ends == [data[at : at + 100] for at, _ in ranges], "ranges far into the object differ"

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
    def test_a_read_past_the_end_reports_the_bytes_that_were_there(self, tier: Tier) -> None:
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
    def test_the_stored_bytes_are_those_written(self, tier: Tier, place: Path) -> None:
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

    # ---------------------------------------------------------------- keys

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
            assert tier.contains([id])[0].status is Status.MISSING, f"{id} was never written, but is found"
            assert put(tier, id, pattern(number, 64)).nbytes == 64
        assert [get(tier, id, 64)[1] for id in ids] == [pattern(number, 64) for number in range(len(ids))]
        assert {found.id for found in tier.scan()} == set(ids)

    @level(Level.KEYS)
    def test_what_is_served_under_an_id_is_that_object(self, tier: Tier) -> None:
        """Object files contain their own id, so a tier that confuses two requests is detected by reading them."""
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
        assert payload is not None, f"chunk {id.depth} was written, but is missing"
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
    def test_an_empty_batch_returns_an_empty_list(self, tier: Tier) -> None:
        assert tier.contains([]) == tier.read_into([]) == tier.write([]) == tier.delete([]) == []

    # ---------------------------------------------------------------- reset

    @level(Level.RESET)
    def test_deleted_objects_are_gone_and_may_be_written_again(self, tier: Tier) -> None:
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
            assert get(tier, object_id(number), 1)[0].status is Status.MISSING, "served after clear()"
        assert list(tier.scan()) == [Found(object_id(0, namespace=OTHER_NAMESPACE), 1)]
        assert {r.status for r in tier.contains([object_id(number) for number in range(4)])} == {Status.MISSING}
        assert tier.clear() == 1
        assert list(tier.scan()) == []
        assert tier.clear() == 0
        assert put(tier, object_id(0), b"z").nbytes == 1

    @level(Level.RESET)
    @requires("raw")
    def test_clear_and_delete_leave_nothing_behind(self, tier: Tier, place: Path) -> None:
        for number in range(4):
            put(tier, object_id(number))
        assert len(self.raw_files(tier, place)) == 4
        tier.delete([object_id(0)])
        assert len(self.raw_files(tier, place)) == 3
        tier.clear()
        assert not self.raw_files(tier, place)

    @level(Level.RESET)
    def test_scan_and_used_bytes_include_every_object(self, tier: Tier) -> None:
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
    def test_more_objects_than_a_store_lists_at_once_are_listed_deleted_and_cleared(self, tier: Tier) -> None:
        kept = [object_id(number) for number in range(self.many)]
        deleted = [object_id(number, namespace=OTHER_NAMESPACE) for number in range(self.many)]
        for ids in (kept, deleted):
            assert {result.status for result in tier.write([Write(id, [b"x"]) for id in ids])} == {Status.OK}
        assert len({found.id for found in tier.scan()}) == 2 * self.many
        assert {result.status for result in tier.contains(kept)} == {Status.OK}
        assert {result.status for result in tier.delete(deleted)} == {Status.OK}
        assert {result.status for result in tier.contains(deleted)} == {Status.MISSING}, "served after delete()"
        assert {found.id for found in tier.scan()} == set(kept)
        assert tier.clear(NAMESPACE) == self.many
        assert {result.status for result in tier.contains(kept)} == {Status.MISSING}, "served after clear()"
        assert list(tier.scan()) == []
        assert tier.used_bytes() == 0

    @level(Level.RESET)
    def test_contains_and_scan_change_nothing(self, tier: Tier) -> None:
        put(tier, object_id(0), b"x")
        before = tier.used_bytes()
        for _ in range(3):
            tier.contains([object_id(0), object_id(1)])
            list(tier.scan())
        assert tier.used_bytes() == before
        assert get(tier, object_id(0), 1)[1] == b"x"
