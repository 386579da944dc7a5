"""Several processes on one folder, and killed processes: every object is complete, and nothing flushed is lost."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from lmcache.format.file import canonical_form, verify_file
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import KVSpec
from lmcache.tiers import disk, owner
from lmcache.tiers.base import Write
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import object_of, relative_path, walk
from lmcache.tiers.janitor import Timing
from lmcache.tiers.rawio import write_all
from lmcache_conformance.labs.tier_objects import NAMESPACE, load, object_id, payload_of, put

BIG_SPEC = KVSpec.uniform("big", layers=4, kv_heads=8, head_dim=128, dtype="bfloat16")
BIG = canonical_form(BIG_SPEC, 0, 64)
"""1 MiB per object: a write takes long enough to be killed in the middle of it."""

QUICK = Timing(tick=0.01, rescan=0.05, patience=5.0)
_PAYLOAD = memoryview(bytes(range(256)) * (BIG.nbytes // 256))

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def big_id(number: int) -> ObjectId:
    return object_id(number, rect=BIG_SPEC.rects[0], tokens=64)


def put_big(tier: DiskTier, number: int) -> Status:
    [result] = tier.write([Write(big_id(number), BIG.encode(big_id(number), _PAYLOAD))])
    return result.status


def in_child(work: Callable[[], None]) -> ForkProcess:
    """Runs `work` in a forked process; its exit code is 0 if nothing was raised."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def finish(*processes: ForkProcess) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.002)


def temporaries(folder: Path) -> list[str]:
    return [entry.name for entry in walk(str(folder / "objects")) if entry.temp]


def test_killed_fifty_times_while_writing_it_serves_whole_objects_and_all_that_was_flushed(shm: Path) -> None:
    rng = random.Random(5)
    caught_writing = 0
    flushed: set[int] = set()
    for round in range(50):
        read_end, write_end = os.pipe()

        def write_until_killed(first: int = 1000 * round, pipe: int = write_end) -> None:
            tier = DiskTier(shm, timing=QUICK)

            def work(start: int) -> None:
                for number in range(start, first + 1000, 2):
                    assert put_big(tier, number) is Status.OK
                    tier.flush()
                    os.write(pipe, struct.pack("<i", number))

            threads = [threading.Thread(target=work, args=(first + i,), daemon=True) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        child = in_child(write_until_killed)
        os.close(write_end)
        told = os.read(read_end, 4)  # it is running
        time.sleep(rng.uniform(0, 0.01))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with os.fdopen(read_end, "rb") as pipe:
            told += pipe.read()
        flushed |= {number for (number,) in struct.iter_unpack("<i", told[: len(told) // 4 * 4])}
        caught_writing += bool(temporaries(shm))

        tier = DiskTier(shm, timing=QUICK)  # the restart
        entries = [entry for entry in walk(str(shm / "objects")) if not entry.temp]
        for entry in entries:
            verify_file(entry.path, object_of(entry))
        assert {big_id(number) for number in flushed} <= {found.id for found in tier.scan()}
        assert tier._janitor.collect()
        assert temporaries(shm) == []
        assert tier.used_bytes() == sum(found.nbytes for found in tier.scan())
        if round % 5 == 4:
            tier.clear()
            flushed.clear()
        tier.close()
    assert caught_writing >= 5, "it was hardly ever killed in the middle of a write: this test shows little"


def test_two_processes_keep_one_capacity(shm: Path) -> None:
    capacity = 40 * BIG.stored_bytes
    outcomes = {start: shm / f"outcome-{start}" for start in (0, 1000)}

    def write(start: int) -> None:
        tier = DiskTier(shm, capacity, timing=QUICK)
        stored = sum(put_big(tier, number) is Status.OK for number in range(start, start + 200))
        outcomes[start].write_text(str(stored))
        tier.close()

    processes = [in_child(lambda start=start: write(start)) for start in outcomes]  # type: ignore[misc]
    most = 0
    while any(process.is_alive() for process in processes):
        held = sum(entry.size for entry in walk(str(shm / "objects")) if not entry.temp)
        most = max(most, held)
    finish(*processes)
    assert most <= capacity * 1.2, "far above the capacity, even though a listing is no snapshot"
    assert most >= capacity // 2
    assert all(int(outcome.read_text()) >= 190 for outcome in outcomes.values())

    tier = DiskTier(shm, capacity, timing=QUICK)
    tier._janitor.collect()
    found = list(tier.scan())
    assert 30 * BIG.stored_bytes <= tier.used_bytes() == sum(f.nbytes for f in found) <= capacity
    for entry in walk(str(shm / "objects")):
        verify_file(entry.path, object_of(entry))
    tier.close()


def test_both_processes_writing_the_same_objects_end_with_one_of_each(shm: Path) -> None:
    def write() -> None:
        tier = DiskTier(shm, timing=QUICK)
        for number in range(40):
            assert put_big(tier, number) is Status.OK
            assert tier.contains([big_id(number)])[0].status is Status.OK
        tier.close()

    finish(*[in_child(write) for _ in range(3)])
    tier = DiskTier(shm, timing=QUICK)
    assert sorted(found.id.depth for found in tier.scan()) == list(range(40))
    assert tier.used_bytes() == 40 * BIG.stored_bytes
    assert temporaries(shm) == []
    for entry in walk(str(shm / "objects")):
        verify_file(entry.path, object_of(entry))
    tier.close()


def test_when_the_janitors_process_is_killed_another_one_takes_over(shm: Path) -> None:
    capacity = 20 * BIG.stored_bytes

    def hold() -> None:
        tier = DiskTier(shm, capacity, timing=QUICK)
        wait(lambda: tier._janitor.holds_lock)
        (shm / "holding").touch()
        signal.pause()

    child = in_child(hold)
    wait((shm / "holding").exists)
    tier = DiskTier(shm, capacity, timing=QUICK)
    time.sleep(0.1)
    assert not tier._janitor.holds_lock
    child.kill()
    child.join()
    wait(lambda: tier._janitor.holds_lock)
    for number in range(60):
        assert put_big(tier, number) is Status.OK
    assert tier.used_bytes() <= capacity
    assert tier._janitor.evicted >= 40
    tier.close()


def test_a_stopped_janitor_blocks_nobody(shm: Path) -> None:
    capacity = 10 * BIG.stored_bytes

    def hold() -> None:
        tier = DiskTier(shm, capacity, timing=QUICK)
        wait(lambda: tier._janitor.holds_lock)
        (shm / "holding").touch()
        signal.pause()

    child = in_child(hold)
    wait((shm / "holding").exists)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    tier = DiskTier(shm, capacity, timing=QUICK._replace(patience=0.05))
    statuses = [put_big(tier, number) for number in range(15)]
    assert statuses == [Status.OK] * 10 + [Status.FULL] * 5
    child.kill()
    child.join()
    wait(lambda: put_big(tier, 100) is Status.OK)
    tier.close()


def test_a_forked_child_works_on_and_its_parents_lock_dies_with_the_parent(shm: Path) -> None:
    tier = DiskTier(shm, 10 * BIG.stored_bytes, timing=QUICK)
    wait(lambda: tier._janitor.holds_lock)
    put(tier, object_id(1))

    def work() -> None:
        assert load(tier, object_id(1)) == payload_of(object_id(1))
        assert not tier._janitor.holds_lock
        assert put(tier, object_id(2)).status is Status.OK
        assert threading.active_count() == 2, "its own janitor waits for the lock"
        (shm / "written").touch()
        wait((shm / "end").exists)
        assert tier._janitor.holds_lock, "it took over"
        tier.close()

    child = in_child(work)
    wait((shm / "written").exists)
    assert tier._janitor.holds_lock
    assert load(tier, object_id(2)) == payload_of(object_id(2))
    tier.close()
    time.sleep(0.2)
    (shm / "end").touch()
    finish(child)


def test_a_fork_while_locks_are_held_does_not_hang_the_child(shm: Path) -> None:
    tier = DiskTier(shm, timing=QUICK)
    with tier._lock, tier._janitor._mutex, tier._usage._mutex:
        child = in_child(lambda: _assert_ok(put(tier, object_id(1)).status))
    finish(child)
    assert load(tier, object_id(1)) == payload_of(object_id(1))
    tier.close()


def _assert_ok(status: Status) -> None:
    assert status is Status.OK


def test_clear_in_one_process_is_a_miss_in_another(shm: Path) -> None:
    tier = DiskTier(shm, timing=QUICK)
    for number in range(5):
        put(tier, object_id(number))

    def clear() -> None:
        other = DiskTier(shm, timing=QUICK)
        assert other.clear(NAMESPACE) == 5
        other.close()

    finish(in_child(clear))
    assert {result.status for result in tier.contains([object_id(n) for n in range(5)])} == {Status.MISSING}
    assert load(tier, object_id(0)) is None
    assert tier.used_bytes() == 0
    assert put(tier, object_id(0)).status is Status.OK
    assert (shm / "objects" / relative_path(object_id(0))).exists()
    tier.close()


OTHER_NAMESPACE = bytes(reversed(NAMESPACE))


def clear_in_child(folder: Path, namespace: bytes | None) -> None:
    def clear() -> None:
        tier = DiskTier(folder, timing=QUICK)
        tier.clear(namespace)
        tier.close()

    finish(in_child(clear))


@pytest.mark.parametrize("namespace", [None, NAMESPACE])
def test_what_was_gathered_before_another_processs_clear_is_not_published_after_it(
    shm: Path, namespace: bytes | None
) -> None:
    tier = DiskTier(shm, timing=QUICK)
    begun = time.monotonic()
    clear_in_child(shm, namespace)
    write = Write(big_id(1), BIG.encode(big_id(1), _PAYLOAD), begun)
    assert tier.write([write])[0].status is Status.CANCELLED
    assert tier.contains([big_id(1)])[0].status is Status.MISSING
    assert tier.used_bytes() == 0
    assert put_big(tier, 1) is Status.OK, "gathered now"
    wait(lambda: tier.clear_epoch == 1)
    assert tier.cleared_since(0) == (1, [namespace])
    assert tier.cleared_since(1) == (1, [])
    assert tier.write([write._replace(id=big_id(2))])[0].status is Status.CANCELLED
    assert tier.write([write._replace(id=big_id(2), begun=time.monotonic())])[0].status is Status.OK
    tier.close()


def test_a_clear_of_one_namespace_cancels_no_write_to_another(shm: Path) -> None:
    tier = DiskTier(shm, timing=QUICK)
    begun = time.monotonic()
    clear_in_child(shm, OTHER_NAMESPACE)
    assert tier.write([Write(big_id(1), BIG.encode(big_id(1), _PAYLOAD), begun)])[0].status is Status.OK
    tier.close()


def test_a_clear_on_another_host_counts_from_when_it_is_noticed(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(shm, timing=QUICK._replace(tick=0.05))
    other = DiskTier(shm, timing=QUICK)
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(owner, "host_tag", lambda: "another host")
        other.clear()
    wait(lambda: tier.clear_epoch == 1)
    write = Write(big_id(1), BIG.encode(big_id(1), _PAYLOAD), begun)
    assert tier.write([write])[0].status is Status.CANCELLED
    assert tier.write([write._replace(begun=time.monotonic())])[0].status is Status.OK
    tier.close()
    other.close()


def test_who_has_missed_more_clears_than_are_recorded_treats_everything_as_cleared(shm: Path) -> None:
    tier = DiskTier(shm, timing=QUICK._replace(tick=0.05))
    begun = time.monotonic()
    other = DiskTier(shm, timing=QUICK)
    for _ in range(100):
        other.clear(OTHER_NAMESPACE)
    wait(lambda: tier.clear_epoch == 100)
    assert tier.cleared_since(0) == (100, [None])
    assert other.cleared_since(0) == (100, [None]), "it cannot tell which of them were its own"
    assert other.cleared_since(90) == (100, [])
    assert tier.write([Write(big_id(1), BIG.encode(big_id(1), _PAYLOAD), begun)])[0].status is Status.CANCELLED
    tier.close()
    other.close()


def test_a_folder_made_anew_counts_as_cleared(shm: Path) -> None:
    tier = DiskTier(shm, timing=QUICK)
    tier.clear()
    (shm / "folder.json").unlink()
    DiskTier(shm, timing=QUICK).close()
    wait(lambda: tier.clear_epoch == 0)
    assert tier.cleared_since(1) == (0, [None])
    tier.close()


def test_clears_at_random_moments_leave_nothing_that_was_gathered_before(shm: Path) -> None:
    """A process with two writers, and clears here: after each of them, all that is there was gathered after it began."""
    gathered = memoryview(mmap.mmap(-1, 8 * 100_000)).cast(
        "q"
    )  # object → when its gathering began, on this machine's clock
    ending = memoryview(mmap.mmap(-1, mmap.PAGESIZE))

    def write() -> None:
        tier = DiskTier(shm, timing=QUICK)

        def work(number: int) -> None:
            rng = random.Random(number)
            while not ending[0]:
                gathered[number], begun = time.monotonic_ns(), time.monotonic()
                time.sleep(rng.uniform(0, 0.003))
                [result] = tier.write([Write(big_id(number), BIG.encode(big_id(number), _PAYLOAD), begun)])
                assert result.status in (Status.OK, Status.CANCELLED, Status.FAILED)
                number += 2

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tier.close()

    child = in_child(write)
    tier, rng, removed = DiskTier(shm, timing=QUICK), random.Random(3), 0
    for _ in range(150):
        time.sleep(rng.uniform(0, 0.01))
        begun = time.monotonic_ns()
        removed += tier.clear(rng.choice([None, NAMESPACE]))
        for _ in range(4):
            early = [found.id.depth for found in tier.scan() if gathered[found.id.depth] < begun]
            assert early == []
    ending[0] = 1
    finish(child)
    assert removed > 20, "hardly anything was written between clears: this test shows little"
    assert tier.used_bytes() == sum(found.nbytes for found in tier.scan())
    tier.close()


@pytest.mark.parametrize("listed_first", [False, True], ids=["removed before its bytes are reserved", "after"])
def test_a_clear_that_removes_what_is_being_written_leaves_the_count_exact(
    shm: Path, monkeypatch: pytest.MonkeyPatch, listed_first: bool
) -> None:
    tier, other = DiskTier(shm, timing=QUICK), DiskTier(shm, timing=QUICK)
    create, remove = tier._create, other._usage.remove
    go_on, removing = threading.Event(), threading.Event()

    def slow_remove(path: str, nbytes: int | None) -> bool:
        removing.set()
        go_on.wait(30)
        return remove(path, nbytes)

    def cleared_meanwhile(path: str) -> int:
        fd = create(path)
        if listed_first:  # the clear has seen an empty file, and removes it once it has its size
            monkeypatch.setattr(other._usage, "remove", slow_remove)
            clearing.start()
            removing.wait(30)
        else:
            clearing.start()
            clearing.join()
        return fd

    def write_all_later(fd: int, parts: Sequence[memoryview | bytes], deadline: float | None) -> int:
        if listed_first:
            go_on.set()
            clearing.join()
        return write_all(fd, parts, deadline)

    clearing = threading.Thread(target=other.clear)
    monkeypatch.setattr(tier, "_create", cleared_meanwhile)
    monkeypatch.setattr(disk, "write_all", write_all_later)
    [result] = tier.write([Write(big_id(0), BIG.encode(big_id(0), _PAYLOAD))])
    assert result.status in (Status.CANCELLED, Status.FAILED)
    assert list(other.scan()) == []
    assert other.used_bytes() == 0
    tier.close()
    other.close()
