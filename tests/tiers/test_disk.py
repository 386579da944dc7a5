"""The contents of the disk tier's folder. The contract of the tier interface is tested in conformance/tests."""

from __future__ import annotations

import gc
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache.errors import TierError
from lmcache.format.file import verify_file
from lmcache.plan import Status
from lmcache.tiers import rawio
from lmcache.tiers.base import Range, Read, Write
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import relative_path
from lmcache.tiers.janitor import Timing
from lmcache_conformance.labs.tier_objects import (
    FORM,
    OTHER_NAMESPACE,
    get,
    load,
    object_id,
    payload_of,
    put,
    stored_form,
)

QUICK = Timing(tick=0.02, rescan=0.1, patience=2.0)


def test_an_object_is_one_checkable_file_whose_name_is_its_id(shm: Path) -> None:
    tier = DiskTier(shm)
    put(tier, object_id(7))
    path = shm / "objects" / relative_path(object_id(7))
    assert path.name == f"{object_id(7).chain.hex()}.0.L0-2.H0-2.7.16.safetensors"
    assert path.read_bytes()[8:] != b""
    assert verify_file(path, object_id(7)).id == object_id(7)
    assert load(tier, object_id(7)) == payload_of(object_id(7))
    tier.close()


def test_only_the_owner_may_look(shm: Path) -> None:
    old = os.umask(0)
    try:
        tier = DiskTier(shm / "deep" / "cache")
        put(tier, object_id(0))
        tier.close()
    finally:
        os.umask(old)
    for folder, folders, files in os.walk(shm / "deep" / "cache"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert {stat.S_IMODE(os.stat(os.path.join(folder, file)).st_mode) for file in files} <= {0o600}
        assert folders or files


def test_nothing_but_objects_is_left_behind(shm: Path) -> None:
    tier = DiskTier(shm, 4 * FORM.stored_bytes, timing=QUICK)
    for number in range(20):
        put(tier, object_id(number))
    tier.close()
    files = [file for _, _, files in os.walk(shm / "objects") for file in files]
    assert files
    assert all(file.endswith(".safetensors") for file in files)
    assert sorted(os.listdir(shm)) == ["folder.json", "janitor.lock", "objects", "usage"]


def test_a_path_that_is_a_file_is_refused_with_advice(shm: Path) -> None:
    (shm / "file").write_text("I was here first")
    with pytest.raises(TierError, match="choose another folder"):
        DiskTier(shm / "file")
    assert (shm / "file").read_text() == "I was here first"


def test_a_home_folder_may_be_written_with_a_tilde(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shm))
    tier = DiskTier("~/cache")
    assert tier.root == shm / "cache"
    tier.close()


def test_what_one_opener_writes_another_one_sees_at_once(shm: Path) -> None:
    one, other = DiskTier(shm, timing=QUICK), DiskTier(shm, timing=QUICK)
    put(one, object_id(0))
    assert other.contains([object_id(0)])[0].status is Status.OK
    assert load(other, object_id(0)) == payload_of(object_id(0))
    assert other.used_bytes() == one.used_bytes() == FORM.stored_bytes
    assert other.clear() == 1
    assert load(one, object_id(0)) is None
    assert one.used_bytes() == 0
    one.close()
    other.close()


def test_clear_leaves_other_namespaces_and_no_empty_folders(shm: Path) -> None:
    tier = DiskTier(shm)
    for number in range(5):
        put(tier, object_id(number))
    put(tier, object_id(1, namespace=OTHER_NAMESPACE))
    assert tier.clear(object_id(0).namespace) == 5
    assert os.listdir(shm / "objects") == [OTHER_NAMESPACE.hex()]
    tier.close()


def test_clear_ends_a_write_that_has_begun(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(shm)
    written, cleared = threading.Event(), threading.Event()
    pwritev = os.pwritev

    def slow(*args: Any) -> int:
        written.set()
        assert cleared.wait(10)
        return pwritev(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    results = []
    writer = threading.Thread(target=lambda: results.append(put(tier, object_id(0))))
    writer.start()
    assert written.wait(10)
    tier.clear()
    cleared.set()
    writer.join()
    assert results[0].status is Status.CANCELLED
    assert tier.contains([object_id(0)])[0].status is Status.MISSING
    assert tier.used_bytes() == 0
    monkeypatch.undo()
    assert put(tier, object_id(0)).status is Status.OK
    tier.close()


def test_a_deadline_that_passes_midway_leaves_nothing_behind(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(shm)
    monkeypatch.setattr(rawio, "_STEP", 1000)
    pwritev, preadv, monotonic = os.pwritev, os.preadv, time.monotonic
    passed = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + passed)

    def slowly(call: Callable[..., int]) -> Callable[..., int]:
        def called(*args: Any) -> int:
            nonlocal passed
            passed += 100
            return call(*args)

        return called

    monkeypatch.setattr(os, "pwritev", slowly(pwritev))
    [result] = tier.write([Write(object_id(0), [bytes(5000)])], deadline=time.monotonic() + 60)
    assert (result.status, result.nbytes) == (Status.LATE, 1000)
    assert [file for _, _, files in os.walk(shm / "objects") for file in files] == []
    assert tier.used_bytes() == 0
    monkeypatch.setattr(os, "pwritev", pwritev)
    put(tier, object_id(0), bytes(5000))
    monkeypatch.setattr(os, "preadv", slowly(preadv))
    read = Read(object_id(0), [memoryview(bytearray(5000))], [Range(0, 5000)])
    [result] = tier.read_into([read], deadline=time.monotonic() + 60)
    assert (result.status, result.nbytes) == (Status.LATE, 1000)
    monkeypatch.setattr(os, "preadv", preadv)
    assert tier.read_into([read])[0] == (Status.OK, 5000, "")
    tier.close()


def test_a_closed_tier_claims_nothing(shm: Path) -> None:
    tier = DiskTier(shm)
    put(tier, object_id(0))
    tier.close()
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TierError, match="closed"):
        tier.clear()
    assert tier.used_bytes() == 0
    assert len(os.listdir("/proc/self/fd")) == handles
    assert (shm / "objects" / relative_path(object_id(0))).exists()


def test_a_buffer_that_does_not_fit_its_range_fails_alone(shm: Path) -> None:
    tier = DiskTier(shm)
    put(tier, object_id(0), b"0123456789")
    good, bad = bytearray(4), bytearray(4)
    results = tier.read_into(
        [
            Read(object_id(0), [memoryview(bad)], [Range(0, 5)]),
            Read(object_id(0), [memoryview(good)], [Range(2, 4)]),
        ]
    )
    assert [result.status for result in results] == [Status.FAILED, Status.OK]
    assert bytes(good) == b"2345"
    tier.close()


def test_reading_notes_the_use_once_per_grain(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(shm, timing=QUICK._replace(grain=1e9))
    put(tier, object_id(0))
    path = shm / "objects" / relative_path(object_id(0))
    os.utime(path, (1.0, 2.0))
    noted = []
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda *args, **kwargs: (noted.append(args), utime(*args, **kwargs)))
    for _ in range(5):
        get(tier, object_id(0), 10)
    assert len(noted) == 1
    assert path.stat().st_atime > 1e9
    assert path.stat().st_mtime == 2.0
    tier.close()


def test_a_tier_that_nobody_closed_releases_lock_and_thread(shm: Path) -> None:
    before = set(threading.enumerate())
    tier = DiskTier(shm, timing=QUICK)
    [janitor] = set(threading.enumerate()) - before
    del tier
    assert not janitor.is_alive()
    again = DiskTier(shm, timing=QUICK)
    assert again._janitor.collect()
    again.close()


def test_a_thousand_cycles_leave_no_handle_and_no_thread(shm: Path) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    def settles_at_most(bound: int) -> bool:  # the janitor briefly opens a folder now and then
        return any(handles() <= bound or time.sleep(0.01) for _ in range(500))

    gc.collect()  # files that earlier tests left open
    threads, before = set(threading.enumerate()), handles()
    for _ in range(20):
        tier = DiskTier(shm, 20 * FORM.stored_bytes, timing=QUICK)
        for number in range(50):
            put(tier, object_id(number))
            assert load(tier, object_id(number)) in (payload_of(object_id(number)), None)
            load(tier, object_id(number + 1000))
        assert settles_at_most(before + 2)  # the usage file and the janitor's lock
        tier.close()
    assert settles_at_most(before)
    assert not set(threading.enumerate()) - threads


def test_the_stored_form_is_what_was_encoded(shm: Path) -> None:
    tier = DiskTier(shm)
    data = stored_form(object_id(0))
    put(tier, object_id(0), data)
    assert (shm / "objects" / relative_path(object_id(0))).read_bytes() == data
    tier.close()
