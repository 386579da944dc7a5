"""Faults in the folder: each is a miss or a failure result, never an exception, and the tier recovers once the cause is gone."""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lmcache.errors import FormatError, TierError
from lmcache.format.codec import ObjectCodec
from lmcache.plan import Status
from lmcache.tiers import disk
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import relative_path
from lmcache.tiers.janitor import Timing
from lmcache_conformance.labs.tier_objects import FORM, SPEC, TOKENS, get, load, object_id, payload_of, put, stored_form

QUICK = Timing(tick=0.02, rescan=0.1)
ID = object_id(1)


@pytest.fixture
def tier(shm: Path) -> Iterator[DiskTier]:
    tier = DiskTier(shm, timing=QUICK)
    yield tier
    tier.close()


@pytest.fixture
def path(tier: DiskTier) -> Path:
    """The path of the object `ID`, written and intact."""
    assert put(tier, ID).status is Status.OK
    return tier.root / "objects" / relative_path(ID)


# ---------------------------------------------------------------- damaged files

_HEAD, _END = FORM.payload_offset, FORM.payload_offset + FORM.nbytes
_LENGTHS = [1, 7, 8, 9, 100, _HEAD - 1, _HEAD, _HEAD + 1, _HEAD + FORM.nbytes // 2, _END - 1]


@pytest.mark.parametrize("length", _LENGTHS)
def test_a_truncated_file_is_not_served(tier: DiskTier, path: Path, length: int) -> None:
    os.truncate(path, length)
    with pytest.raises(FormatError):
        load(tier, ID)
    tier.delete([ID])
    put(tier, ID)
    assert load(tier, ID) == payload_of(ID)


@pytest.mark.parametrize("region", ["length", "json", "padding", "payload"])
def test_a_flipped_bit_is_not_served(tier: DiskTier, path: Path, region: str) -> None:
    data = path.read_bytes()
    text_end = len(data[:_HEAD].rstrip())
    low, high = {"length": (0, 8), "json": (8, text_end), "padding": (text_end, _HEAD), "payload": (_HEAD, _END)}[
        region
    ]
    rng = random.Random(region)
    for _ in range(40):
        bit = rng.randrange(8 * low, 8 * high)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            load(tier, ID)
    path.write_bytes(data)
    assert load(tier, ID) == payload_of(ID)


def test_an_empty_file_is_a_miss_and_makes_way_for_the_object(tier: DiskTier, path: Path) -> None:
    os.truncate(path, 0)
    assert tier.contains([ID])[0].status is Status.MISSING
    assert load(tier, ID) is None
    assert [found.id for found in tier.scan()] == []
    assert put(tier, ID) == (Status.OK, FORM.stored_bytes, "")
    assert load(tier, ID) == payload_of(ID)


def test_a_file_renamed_to_another_objects_name_is_not_served(tier: DiskTier, path: Path) -> None:
    put(tier, object_id(2))
    os.replace(tier.root / "objects" / relative_path(object_id(2)), path)
    with pytest.raises(FormatError, match="not chunk"):
        load(tier, ID)
    assert load(tier, object_id(2)) is None


@pytest.mark.parametrize("claim", [2**30, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_is_not_served(tier: DiskTier, path: Path, claim: int) -> None:
    path.write_bytes(claim.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(FormatError, match="a header of"):
        load(tier, ID)


def test_foreign_files_are_neither_served_nor_removed(shm: Path) -> None:
    tier = DiskTier(shm, 6 * FORM.stored_bytes, timing=QUICK)
    put(tier, ID)
    home = (shm / "objects" / relative_path(ID)).parent
    name = os.path.basename(relative_path(ID))
    foreign = [
        shm / "README",
        shm / "objects" / "notes.txt",
        shm / "objects" / "zz" / "x.safetensors",
        home / "model.safetensors",
        home / name.upper(),
        home / name.replace(".0.L", ".00.L"),
        home / (name + ".bak"),
        home / ".tmp-mine",
        home.parent / "ff" / name,
    ]
    for file in foreign:
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(b"not yours")
    for number in range(10, 30):
        put(tier, object_id(number))
    assert {found.id for found in tier.scan()} <= {ID, *map(object_id, range(10, 30))}
    tier._janitor.collect()
    assert tier.used_bytes() == sum(found.nbytes for found in tier.scan())
    tier.clear()
    tier._janitor.collect()
    assert list(tier.scan()) == []
    assert all(file.read_bytes() == b"not yours" for file in foreign)
    tier.close()


@pytest.mark.parametrize("make", ["symlink", "dangling", "directory", "fifo", "socket"])
def test_what_is_not_a_regular_file_is_neither_served_nor_removed(tier: DiskTier, shm: Path, make: str) -> None:
    put(tier, object_id(2))
    path = shm / "objects" / relative_path(ID)
    path.parent.mkdir(parents=True, exist_ok=True)
    (shm / "target").write_bytes(stored_form(ID))
    if make in ("symlink", "dangling"):
        path.symlink_to(shm / ("target" if make == "symlink" else "nowhere"))
    elif make == "directory":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    else:
        os.mknod(path, 0o140600)
    assert tier.contains([ID])[0].status is Status.MISSING
    assert load(tier, ID) is None
    result = put(tier, ID)
    assert result.status is Status.FAILED
    assert "not an object" in result.detail
    assert tier.delete([ID])[0].status is Status.OK
    assert [found.id for found in tier.scan()] == [object_id(2)]
    tier.clear()
    assert os.path.lexists(path)
    assert tier.used_bytes() == 0


def test_a_file_that_vanishes_is_a_miss(tier: DiskTier, path: Path) -> None:
    path.unlink()
    assert load(tier, ID) is None
    assert tier.delete([ID])[0].status is Status.OK
    assert put(tier, ID).nbytes == FORM.stored_bytes


def test_a_file_that_vanishes_while_being_read_is_still_read_whole(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def vanish(*args: object) -> int:
        path.unlink(missing_ok=True)
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", vanish)
    assert load(tier, ID) == payload_of(ID)
    assert load(tier, ID) is None


@pytest.mark.parametrize("when", ["idle", "writing"])
def test_a_folder_that_vanishes_is_made_anew(
    tier: DiskTier, path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "idle":
        shutil.rmtree(tier.root)
        assert load(tier, ID) is None
        assert list(tier.scan()) == []
        assert tier.contains([ID])[0].status is Status.MISSING
        assert tier.clear() == 0
        tier.flush(durable=True)
    else:
        link = os.link
        monkeypatch.setattr(os, "link", lambda src, dst: (shutil.rmtree(tier.root), link(src, dst)))
        assert put(tier, object_id(2)).status is Status.FAILED
        monkeypatch.undo()
    assert put(tier, ID).nbytes == FORM.stored_bytes
    assert load(tier, ID) == payload_of(ID)
    tier._janitor.collect()
    assert tier.used_bytes() == FORM.stored_bytes
    assert oct(os.stat(tier.root).st_mode & 0o777) == "0o700"


# ---------------------------------------------------------------- filesystem errors


@pytest.fixture
def tiny(shm: Path) -> Iterator[Path]:
    """A real filesystem of 1 MiB."""
    mount = shm / "tiny"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_device_is_reported_backed_off_from_and_recovered(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = DiskTier(tiny, timing=QUICK)
    big = bytes(100_000)
    with caplog.at_level(logging.WARNING, "lmcache"):
        results = [put(tier, object_id(number), big).status for number in range(40)]
    stored = [object_id(number) for number, status in enumerate(results) if status is Status.OK]
    assert 5 <= len(stored) <= 10
    assert set(results) == {Status.OK, Status.FULL}
    assert [record.getMessage().split()[0] for record in caplog.records] == ["disk-full"]
    assert [get(tier, id, 100_000)[1] for id in stored] == [big] * len(stored)
    leftovers = [file for _, _, files in os.walk(tiny) for file in files if file.startswith(".tmp")]
    assert leftovers == []
    assert tier.used_bytes() == 100_000 * len(stored)

    pause = tier._pause
    assert pause > 0
    tier._resume_at = 0.0  # skip the pause: the device is still full, so the next one is longer
    assert put(tier, object_id(50), big).status is Status.FULL
    assert tier._pause == 2 * pause

    tier.delete(stored[:3])
    assert "next try" in put(tier, object_id(51), big).detail
    tier._resume_at = 0.0
    assert put(tier, object_id(51), big).status is Status.OK
    assert tier._pause == 0.0
    assert put(tier, object_id(52), big).status is Status.OK
    tier.close()


def test_a_full_device_can_still_be_opened_and_read(tiny: Path) -> None:
    tier = DiskTier(tiny, timing=QUICK)
    put(tier, ID)
    tier.close()
    with open(tiny / "filler", "wb", buffering=0) as filler:
        assert filler.write(bytes(1 << 20)) < 1 << 20
    tier = DiskTier(tiny, timing=QUICK)
    assert load(tier, ID) == payload_of(ID)
    assert put(tier, object_id(2)).status is Status.FULL
    (tiny / "filler").unlink()
    tier._resume_at = 0.0
    assert put(tier, object_id(2)).status is Status.OK
    tier.close()


def test_a_read_only_filesystem_is_read_and_nothing_more(tiny: Path) -> None:
    tier = DiskTier(tiny, 500_000, timing=QUICK)
    put(tier, ID)
    tier._janitor.close()  # open files would prevent remounting read-only
    tier._usage.close()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    assert load(tier, ID) == payload_of(ID)
    assert tier.contains([ID])[0].status is Status.OK
    result = put(tier, object_id(2))
    assert result.status is Status.FAILED
    assert "Read-only" in result.detail
    assert tier.delete([ID])[0].status is Status.FAILED
    with pytest.raises(TierError, match="not everything could be removed"):
        tier.clear()
    with pytest.raises(TierError, match="choose another folder"):
        DiskTier(tiny)
    subprocess.run(["mount", "-o", "remount,rw", str(tiny)], check=True)
    assert put(tier, object_id(2)).status is Status.OK
    assert tier.delete([ID])[0].status is Status.OK
    assert tier.used_bytes() == FORM.stored_bytes
    tier.close()


def _failing(code: int) -> Callable[..., int]:
    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "ftruncate", "pwritev", "close", "link", "mkdir"])
def test_a_write_that_fails_anywhere_leaves_nothing_and_the_next_one_works(
    shm: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    tier = DiskTier(shm)  # slow timing: only our own calls fail
    tier._janitor.close()
    handles = len(os.listdir("/proc/self/fd"))
    real = getattr(os, call)

    def fail(*args: object, **kwargs: object) -> object:
        if call == "open" and ".tmp-" not in str(args[0]):
            return real(*args, **kwargs)
        if call == "close":
            real(*args)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tier._janitor, "start", lambda: None)
    monkeypatch.setattr(os, call, fail)
    result = put(tier, ID)
    monkeypatch.undo()
    assert result.status is (Status.FULL if code in (errno.ENOSPC, errno.EDQUOT) else Status.FAILED)
    assert os.strerror(code) in result.detail
    assert [file for _, _, files in os.walk(shm / "objects") for file in files] == []
    assert tier.used_bytes() == 0
    assert len(os.listdir("/proc/self/fd")) == handles
    tier._resume_at = 0.0
    assert put(tier, ID).status is Status.OK
    assert load(tier, ID) == payload_of(ID)
    tier.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "fstat", "preadv"])
def test_a_read_that_fails_is_a_failure_result_and_the_next_one_works(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    tier._janitor.close()
    monkeypatch.setattr(os, call, _failing(code))
    result, _ = get(tier, ID, 100)
    monkeypatch.undo()
    assert result.status is Status.FAILED
    assert os.strerror(code) in result.detail
    assert load(tier, ID) == payload_of(ID)


def test_a_stat_that_fails_is_a_failure_result(tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier._janitor.close()
    monkeypatch.setattr(os, "stat", _failing(errno.EIO))
    assert tier.contains([ID])[0].status is Status.FAILED
    assert tier.delete([ID])[0].status is Status.FAILED
    assert put(tier, ID).status is Status.FAILED
    monkeypatch.undo()
    assert tier.contains([ID])[0].status is Status.OK


def test_a_folder_that_cannot_be_listed_ends_a_scan_with_a_log_line(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier._janitor.close()
    monkeypatch.setattr(os, "scandir", _failing(errno.EIO))
    with caplog.at_level(logging.WARNING, "lmcache"):
        assert list(tier.scan()) == []
    assert "disk-scan" in caplog.text
    monkeypatch.undo()
    assert len(list(tier.scan())) == 1


def test_a_durable_flush_that_fails_says_so(tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _failing(errno.EIO))
    tier.flush()
    with pytest.raises(TierError, match="durable"):
        tier.flush(durable=True)


def test_a_durable_flush_syncs_each_new_file_and_its_folders_once(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tier, object_id(2))
    tier.delete([object_id(2)])
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    tier.flush(durable=True)
    assert str(path) in synced
    assert {str(path.parent), str(path.parent.parent), str(tier.root / "objects"), str(tier.root)} <= set(synced)
    assert synced.index(str(path)) < synced.index(str(path.parent))
    assert len(synced) == len(set(synced))
    synced.clear()
    tier.flush(durable=True)
    assert synced == []


def test_too_many_unsynced_files_are_synced_with_their_filesystem(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache.tiers.durable._MAX_UNSYNCED", 1)
    put(tier, object_id(2))
    calls: list[str] = []
    monkeypatch.setattr("lmcache.tiers.durable._sync_filesystem", lambda root: calls.append(root))
    tier.flush(durable=True)
    assert calls == [str(tier.root)]


def test_a_durable_flush_that_failed_is_tried_again(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel takes the pages for clean: the bytes are written again before the next one."""
    monkeypatch.setattr(os, "fsync", _failing(errno.EIO))
    for _ in range(2):
        with pytest.raises(TierError, match="durable"):
            tier.flush(durable=True)
    monkeypatch.undo()
    calls: list[tuple[str, str]] = []
    fsync, pwrite = os.fsync, os.pwrite

    def note(name: str, fd: int) -> None:
        calls.append((name, os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(os, "fsync", lambda fd: (note("fsync", fd), fsync(fd))[1])
    monkeypatch.setattr(os, "pwrite", lambda fd, *rest: (note("write", fd), pwrite(fd, *rest))[1])
    tier.flush(durable=True)
    ours = [name for name, where in calls if where == str(path)]
    assert ours[0] == "write"
    assert ours[-1] == "fsync"
    assert str(path.parent) in {where for _, where in calls}
    assert load(tier, ID) == payload_of(ID)


def test_an_interrupted_durable_flush_is_tried_again(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tier.flush(durable=True)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    tier.flush(durable=True)
    assert str(path) in synced


def test_a_durable_flush_waits_for_the_one_under_way(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, proceed = threading.Event(), threading.Event()
    done: list[str] = []

    def slow(fd: int) -> None:
        begun.set()
        assert proceed.wait(10)

    monkeypatch.setattr(os, "fsync", slow)

    def flush(name: str) -> None:
        tier.flush(durable=True)
        done.append(name)

    threads = [threading.Thread(target=flush, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert done == []
    proceed.set()
    for thread in threads:
        thread.join(10)
    assert sorted(done) == ["first", "second"]


def test_a_durable_flush_covers_what_other_processes_published(
    tier: DiskTier, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = DiskTier(shm, timing=QUICK)
    put(other, ID)
    put(other, object_id(2))
    assert put(tier, ID).nbytes == 0  # it is there already
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr("lmcache.tiers.durable._sync_filesystem", lambda root: synced.append("all of " + root))
    tier.flush(durable=True)
    assert str(shm / "objects" / relative_path(ID)) in synced
    assert f"all of {shm}" in synced
    failed = OSError(errno.EIO, "the disk is ill")
    monkeypatch.setattr("lmcache.tiers.durable._sync_filesystem", lambda root: failed)
    with pytest.raises(TierError, match="the disk is ill"):
        tier.flush(durable=True)
    other.close()


def test_a_durable_flush_syncs_the_parents_of_a_new_root(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(shm / "a" / "b" / "cache")
    put(tier, ID)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    tier.flush(durable=True)
    assert {str(shm), str(shm / "a"), str(shm / "a" / "b"), str(shm / "a" / "b" / "cache")} <= set(synced)
    tier.close()


# ---------------------------------------------------------------- damage and other processes


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[_HEAD + 5] ^= 1
    path.write_bytes(data)


def test_a_damaged_object_that_was_replaced_is_kept(tier: DiskTier, path: Path) -> None:
    _damage(path)
    tier.note_damaged(ID)  # what the reader of a damaged object does
    path.unlink()
    put(tier, ID)
    [result] = tier.delete([ID])
    assert (result.status, result.nbytes) == (Status.OK, 0)
    assert load(tier, ID) == payload_of(ID)
    tier.delete([ID])  # asked for without a report: removed
    assert load(tier, ID) is None


def test_a_damaged_object_that_is_still_there_is_removed(tier: DiskTier, path: Path) -> None:
    _damage(path)
    tier.note_damaged(ID)
    assert tier.delete([ID])[0].status is Status.OK
    assert not path.exists()
    assert tier.used_bytes() == 0
    put(tier, ID)
    assert tier.delete_damaged([ID, object_id(2)]) == [
        (Status.OK, 0, "kept: another process has replaced it with a good copy"),
        (Status.OK, 0, ""),
    ]
    assert path.exists()


def test_a_copy_that_replaces_the_damaged_one_after_its_verification_is_kept(
    tier: DiskTier, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _damage(path)
    tier.note_damaged(ID)
    verify_file = disk.verify_file

    def verify(*args: object) -> object:
        try:
            return verify_file(*args)  # type: ignore[arg-type]
        finally:
            path.unlink()
            path.write_bytes(stored_form(ID))

    monkeypatch.setattr(disk, "verify_file", verify)
    tier.delete([ID])
    monkeypatch.undo()
    assert load(tier, ID) == payload_of(ID)


def test_forks_reset_each_tier_by_one_handler(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **given: registered.append(given))
    before = len(disk._tiers)
    for _ in range(5):
        DiskTier(shm).close()
    gc.collect()
    assert registered == []
    assert len(disk._tiers) <= before


def test_a_reader_that_finds_damage_makes_the_delete_verify_first(tier: DiskTier, path: Path) -> None:
    codec = ObjectCodec(SPEC, TOKENS)
    _damage(path)
    out = torch.zeros(FORM.nbytes, dtype=torch.uint8)
    assert codec.load(tier, ID, out, None, None).result.status is Status.CORRUPT
    path.unlink()
    put(tier, ID)
    tier.delete([ID])
    assert codec.load(tier, ID, out, None, None).result.status is Status.OK
