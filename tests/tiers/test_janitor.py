"""The janitor: what it evicts, what it removes, and the shared byte count."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import struct
import threading
import time
from pathlib import Path

import pytest

from lmcache.observe.log import Throttle
from lmcache.plan import Status
from lmcache.tiers.base import Write
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import host_tag, relative_path, walk
from lmcache.tiers.janitor import HIGH, LOW, Timing
from lmcache.tiers.usage import Count, Usage
from lmcache_conformance.labs.tier_objects import FORM, OTHER_NAMESPACE, load, object_id, payload_of, put

SIZE = FORM.stored_bytes
STILL = Timing()


def still(shm: Path, capacity: int | None = None, timing: Timing = STILL) -> DiskTier:
    """A tier whose janitor takes the lock if it is free, and runs only when the test or a writer calls it."""
    tier = DiskTier(shm, capacity, timing=timing, log=Throttle())
    janitor = tier._janitor
    janitor.close()
    janitor._closed = False
    janitor.start = lambda: None  # type: ignore[method-assign]
    janitor.collect()
    return tier


def depths(tier: DiskTier) -> list[int]:
    return sorted(found.id.depth for found in tier.scan())


def age(tier: DiskTier, number: int, seconds: float) -> None:
    used = time.time() - seconds
    os.utime(tier.root / "objects" / relative_path(object_id(number)), (used, used))


# ---------------------------------------------------------------- eviction


def test_what_was_used_longest_ago_goes_first(shm: Path) -> None:
    tier = still(shm, 10 * SIZE)
    for number in range(9):
        put(tier, object_id(number))
        age(tier, number, 1000 * (number + 1))
    load(tier, object_id(8))  # the oldest is used again
    put(tier, object_id(20))
    put(tier, object_id(21))
    assert depths(tier) == [0, 1, 2, 3, 4, 5, 6, 8, 20, 21]
    tier.close()


def test_of_what_was_used_together_the_deepest_goes_first(shm: Path) -> None:
    tier = still(shm, 10 * SIZE, STILL._replace(grain=1e9))
    for number in (3, 0, 7, 1, 5, 2, 8, 6, 4):
        put(tier, object_id(number))
    put(tier, object_id(9))
    put(tier, object_id(10))
    assert depths(tier) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    tier.close()


def test_eviction_stops_at_the_low_mark_and_is_accounted(shm: Path) -> None:
    tier = still(shm, 100 * SIZE)
    for number in range(99):
        put(tier, object_id(number))
    assert tier.used_bytes() == 99 * SIZE > HIGH * 100 * SIZE
    assert tier._janitor.collect()
    assert len(depths(tier)) == LOW * 100
    assert tier.used_bytes() == LOW * 100 * SIZE
    assert tier._janitor.evicted == 9
    tier.close()


def test_below_the_high_mark_nothing_is_evicted(shm: Path) -> None:
    tier = still(shm, 100 * SIZE)
    for number in range(95):
        put(tier, object_id(number))
    tier._janitor.collect()
    assert len(depths(tier)) == 95
    tier.close()


def test_room_is_made_for_a_large_object(shm: Path) -> None:
    tier = still(shm, 10 * SIZE)
    for number in range(9):
        put(tier, object_id(number))
    assert put(tier, object_id(50), bytes(5 * SIZE)).status is Status.OK
    assert tier.used_bytes() <= 10 * SIZE
    assert len(depths(tier)) == 6
    tier.close()


def test_no_capacity_means_no_eviction(shm: Path) -> None:
    tier = still(shm, None)
    for number in range(50):
        put(tier, object_id(number))
    tier._janitor.collect()
    assert len(depths(tier)) == 50
    tier.close()


def test_a_capacity_of_zero_takes_nothing(shm: Path) -> None:
    tier = still(shm, 0)
    assert put(tier, object_id(0)).status is Status.FULL
    assert depths(tier) == []
    tier.close()


def test_a_smaller_capacity_after_a_restart_is_enforced_at_once(shm: Path) -> None:
    tier = still(shm, None)
    for number in range(30):
        put(tier, object_id(number))
    tier.close()
    tier = still(shm, 10 * SIZE)
    assert len(depths(tier)) == 9
    assert tier.used_bytes() == 9 * SIZE
    assert all(load(tier, found.id) == payload_of(found.id) for found in tier.scan())
    tier.close()


def test_all_namespaces_share_the_capacity(shm: Path) -> None:
    tier = still(shm, 10 * SIZE)
    for number in range(8):
        put(tier, object_id(number))
        age(tier, number, 1000)
    for number in range(8):
        put(tier, object_id(number, namespace=OTHER_NAMESPACE))
    spaces = [found.id.namespace for found in tier.scan()]
    assert spaces.count(OTHER_NAMESPACE) == 8
    assert len(spaces) <= 10
    tier.close()


# ---------------------------------------------------------------- leftovers of killed processes


def _dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_temporaries_that_nobody_will_finish_are_removed(shm: Path) -> None:
    tier = still(shm)
    put(tier, object_id(0))
    home = (shm / "objects" / relative_path(object_id(0))).parent
    tag, other, random = host_tag(), "0123456789abcdef", "fedcba9876543210"
    dead, alive, day = _dead_pid(), os.getppid(), 86400.0
    cases = {
        f".tmp-{tag}-{dead}-{random}": (0.0, False),
        f".tmp-{tag}-{alive}-{random}": (0.0, True),
        f".tmp-{tag}-{alive}-{random[::-1]}": (day, False),
        f".tmp-{other}-{dead}-{random}": (0.0, True),  # another host's process, perhaps alive there
        f".tmp-{other}-{dead}-{random[::-1]}": (day, False),
        f".tmp-{tag}-9999999999-{random}": (0.0, True),  # pids are never this large
        ".tmp-not-ours": (day, True),
    }
    for name, (old, _) in cases.items():
        (home / name).write_bytes(b"unfinished")
        os.utime(home / name, (time.time() - old,) * 2)
    tier._janitor.collect()
    assert {name: (home / name).exists() for name in cases} == {name: kept for name, (_, kept) in cases.items()}
    assert tier.used_bytes() == SIZE + 3 * len(b"unfinished")
    tier.close()


def test_empty_folders_of_the_past_are_removed(shm: Path) -> None:
    tier = still(shm)
    put(tier, object_id(0))
    put(tier, object_id(1, namespace=OTHER_NAMESPACE))
    tier.delete([object_id(1, namespace=OTHER_NAMESPACE)])
    space = shm / "objects" / OTHER_NAMESPACE.hex()
    tier._janitor._next_scan = 0.0
    tier._janitor.collect()
    assert space.exists(), "a fresh folder may be about to be used"
    for folder in [*space.glob("*"), space]:
        os.utime(folder, (1.0, 1.0))
    tier._janitor._next_scan = 0.0
    tier._janitor.collect()
    assert not space.exists()
    assert load(tier, object_id(0)) is not None
    tier.close()


# ---------------------------------------------------------------- the count


@pytest.mark.parametrize("content", [b"", b"garbage", struct.pack("<8sqqq", b"lmcuse01", -5, 0, 0), bytes(32)])
def test_a_lost_or_damaged_count_is_taken_anew(shm: Path, content: bytes) -> None:
    tier = still(shm)
    for number in range(3):
        put(tier, object_id(number))
    tier.close()
    (shm / "usage").write_bytes(content)
    tier = still(shm, 100 * SIZE)
    assert tier.used_bytes() == 3 * SIZE
    tier.close()


@pytest.mark.parametrize(
    "numbers", [(0, 0, (1 << 63) - 1), ((1 << 63) - 1, 0, 0), (0, (1 << 62), 0), (1 << 59, 1 << 59, 1 << 59)]
)
def test_a_count_damaged_meanwhile_ends_no_write_and_evicts_no_more_than_needed(
    shm: Path, numbers: tuple[int, int, int]
) -> None:
    tier = DiskTier(shm, 20 * SIZE, timing=Timing(tick=0.01, rescan=0.05))
    for number in range(10):
        put(tier, object_id(number))
    (shm / "usage").write_bytes(struct.pack("<8sqqq", b"lmcuse01", *numbers))
    for number in range(10, 18):
        assert put(tier, object_id(number)).status is Status.OK
    _wait(lambda: tier.used_bytes() == SIZE * len(depths(tier)))
    assert len(depths(tier)) >= 17
    assert tier._janitor._thread is not None
    assert tier._janitor._thread.is_alive()
    tier.close()


@pytest.mark.parametrize("drift", [-2 * SIZE, 10**15])
def test_a_count_that_drifted_is_corrected_by_a_pass(shm: Path, drift: int) -> None:
    tier = still(shm, 100 * SIZE)
    for number in range(3):
        put(tier, object_id(number))
    tier._usage.add(drift)
    assert tier.used_bytes() != 3 * SIZE
    tier._janitor.collect()
    assert tier.used_bytes() == 3 * SIZE
    tier.close()


def test_a_count_far_too_high_does_not_stop_writes(shm: Path) -> None:
    tier = still(shm, 100 * SIZE)
    tier._usage.add(10**15)
    assert put(tier, object_id(0)).status is Status.OK
    assert tier.used_bytes() == SIZE
    tier.close()


def test_changes_during_a_listing_are_not_taken_for_drift(shm: Path) -> None:
    usage = Usage(str(shm / "usage"))
    usage.add(1000)
    before = usage.read()
    usage.add(50)
    assert usage.correct(before, 1000).used == 1050, "the listing was too early to see it"
    before = usage.read()
    usage.add(50)
    assert usage.correct(before, 1100).used == 1100, "the listing saw it"
    before = usage.read()
    usage.rename(30, lambda: None)
    assert usage.correct(before, 1070).used == 1100, "the listing missed a file that was being renamed"
    before = usage.read()
    usage.add(-100)
    assert usage.correct(before, 5000).used == 5000, "that is more than what moved"
    assert usage.correct(usage.read(), 7).used == 7
    usage.close()


def test_threads_count_together(shm: Path) -> None:
    usages = [Usage(str(shm / "usage")) for _ in range(2)]

    def work(usage: Usage) -> None:
        for _ in range(300):
            usage.add(3)
            usage.add(-1)

    threads = [threading.Thread(target=work, args=(usages[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert usages[0].read() == usages[1].read() == Count(2400, 0, 4800)
    for usage in usages:
        usage.close()


def test_the_limit_is_exact_and_missing_room_is_noted(shm: Path) -> None:
    usage = Usage(str(shm / "usage"))
    assert usage.add(60, limit=100)
    assert not usage.add(41, limit=100)
    assert not usage.add(50, limit=100)
    assert usage.add(40, limit=100)
    assert usage.read()[:2] == (100, 50)
    usage.close()


def test_a_lock_that_is_never_released_does_not_hang_the_count(shm: Path) -> None:
    usage = Usage(str(shm / "usage"))
    usage.add(5)
    with open(shm / "usage", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert usage.add(5)
        assert usage.read().used == 10
    usage.close()


def test_without_a_usable_file_the_count_is_this_processs_own(shm: Path) -> None:
    usage = Usage(str(shm / "absent" / "usage"))
    assert not usage.known()
    assert usage.add(60, limit=100)
    assert not usage.add(60, limit=100)
    assert usage.read().used == 60
    usage.close()


# ---------------------------------------------------------------- the lock


def test_only_one_of_two_cleans_up_and_the_other_takes_over(shm: Path) -> None:
    first = still(shm, 10 * SIZE)
    second = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01))
    assert first._janitor.holds_lock
    assert not second._janitor.collect()
    assert not second._janitor.holds_lock
    first.close()
    _wait(lambda: second._janitor.holds_lock)
    for number in range(30):
        assert put(second, object_id(number)).status is Status.OK
    assert second.used_bytes() <= 10 * SIZE
    second.close()


def test_the_holder_makes_room_for_the_others(shm: Path) -> None:
    holder = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01))
    _wait(lambda: holder._janitor.holds_lock)
    writer = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01, patience=10))
    for number in range(40):
        assert put(writer, object_id(number)).status is Status.OK
    assert put(writer, object_id(50), bytes(6 * SIZE)).status is Status.OK
    assert writer._janitor.evicted == 0
    assert holder._janitor.evicted > 30
    holder.close()
    writer.close()


def test_when_the_holder_does_nothing_a_writer_gives_up_in_time(shm: Path) -> None:
    holder = still(shm, 10 * SIZE)
    writer = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01, patience=0.05))
    results = [put(writer, object_id(number)) for number in range(13)]
    assert [result.status for result in results] == [Status.OK] * 10 + [Status.FULL] * 3
    assert "can't be freed" in results[-1].detail
    assert writer.used_bytes() == 10 * SIZE
    holder._janitor.collect()
    assert put(writer, object_id(20)).status is Status.OK
    holder.close()
    writer.close()


def test_a_writer_waits_no_longer_than_its_deadline(shm: Path) -> None:
    holder = still(shm, 10 * SIZE)
    writer = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01, patience=3600))
    for number in range(10):
        put(writer, object_id(number))
    item = Write(object_id(20), [bytes(SIZE)])
    assert writer.write([item], deadline=time.monotonic() + 0.5)[0].status is Status.FULL
    holder.close()
    writer.close()


def test_a_janitor_whose_thread_died_is_started_again(shm: Path) -> None:
    tier = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01))
    tier._janitor._closed = True
    _wait(lambda: not tier._janitor._thread.is_alive())  # type: ignore[union-attr]
    tier._janitor._closed = False
    put(tier, object_id(0))
    assert tier._janitor._thread is not None
    assert tier._janitor._thread.is_alive()
    tier.close()


def test_a_lock_file_that_was_removed_is_taken_again(shm: Path) -> None:
    tier = still(shm, 10 * SIZE)
    shutil.rmtree(shm)
    put(tier, object_id(0))
    assert tier._janitor.collect()
    other = still(shm)
    assert not other._janitor.collect()
    assert other.used_bytes() == tier.used_bytes() == SIZE
    other.close()
    tier.close()


def test_a_folder_that_was_moved_away_is_left_alone(shm: Path) -> None:
    tier = still(shm / "a", 10 * SIZE)
    put(tier, object_id(0))
    (shm / "a").rename(shm / "b")
    put(tier, object_id(1))
    tier._janitor.collect()
    assert tier.used_bytes() == SIZE
    assert depths(tier) == [1]
    moved = still(shm / "b")
    assert moved._janitor.collect()
    assert depths(moved) == [0]
    assert moved.used_bytes() == SIZE
    moved.close()
    tier.close()


def test_a_filesystem_without_locks_still_has_a_janitor(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    tier = still(shm, 10 * SIZE)
    for number in range(30):
        assert put(tier, object_id(number)).status is Status.OK
    assert tier.used_bytes() <= 10 * SIZE
    tier.close()


def test_a_pass_that_fails_is_told_and_tried_again(
    shm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = DiskTier(shm, 10 * SIZE, timing=Timing(tick=0.01, rescan=0.01))
    broken = threading.Event()
    scandir = os.scandir

    def fail(*args: str) -> object:
        broken.set()
        raise OSError(errno.EIO, "the disk is ill")

    with caplog.at_level(logging.WARNING, "lmcache"):
        monkeypatch.setattr(os, "scandir", fail)
        assert broken.wait(10)
        _wait(lambda: "disk-janitor" in caplog.text)
        monkeypatch.setattr(os, "scandir", scandir)
    for number in range(30):
        assert put(tier, object_id(number)).status is Status.OK
    assert tier.used_bytes() <= 10 * SIZE
    assert len(caplog.records) == 1
    tier.close()


def test_walk_meets_objects_and_temporaries_only(shm: Path) -> None:
    tier = still(shm)
    put(tier, object_id(0))
    (shm / "objects" / "not hex").mkdir()
    (shm / "objects" / "abc").write_text("odd and a file")
    assert [entry.name for entry in walk(str(shm / "objects"))] == [os.path.basename(relative_path(object_id(0)))]
    assert list(walk(str(shm / "nowhere"))) == []
    tier.close()


def _wait(condition: object) -> None:
    until = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.002)
