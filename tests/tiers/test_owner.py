"""A folder has one owner and one capacity: who is refused, what is passed by, and the file `folder.json`."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from lmcache.cli.doctor import disk
from lmcache.config import Config
from lmcache.errors import TierError
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import Status
from lmcache.tiers import open_tiers
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import relative_path
from lmcache.tiers.janitor import Timing
from lmcache_conformance.labs.tier_objects import FORM, load, object_id, payload_of, put, stored_form

SIZE = FORM.stored_bytes
QUICK = Timing(tick=0.01, rescan=0.05, patience=2.0)
OTHER = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays two users, so it needs root")


def wait(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def record(root: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((root / "folder.json").read_text())
    return found


# ---------------------------------------------------------------- who is refused


@as_root
@pytest.mark.parametrize("below", ["", "objects"])
def test_a_folder_of_another_user_is_refused_and_named(shm: Path, below: str) -> None:
    (shm / "cache" / "objects").mkdir(parents=True, mode=0o700)
    os.chown(shm / "cache" / below, OTHER, OTHER)
    with pytest.raises(TierError, match=f"{shm / 'cache' / below} belongs to uid {OTHER}.*chown -R 0"):
        DiskTier(shm / "cache")
    found = disk(shm / "cache", 1 << 20, 0)
    assert found.status == "bad"
    assert f"uid {OTHER}" in found.advice


@pytest.mark.parametrize(("below", "mode"), [("", 0o1777), ("", 0o770), ("objects", 0o777), ("objects", 0o720)])
def test_a_folder_that_others_can_write_to_is_refused(shm: Path, below: str, mode: int) -> None:
    (shm / "cache" / "objects").mkdir(parents=True, mode=0o700)
    (shm / "cache" / "something else").touch()
    (shm / "cache" / below).chmod(mode)
    with pytest.raises(TierError, match=f"has mode {mode:04o}.*chmod go-w"):
        DiskTier(shm / "cache")
    assert stat.S_IMODE((shm / "cache" / below).stat().st_mode) == mode
    assert disk(shm / "cache", 1 << 20, 0).status == "bad"


def test_a_folder_used_for_nothing_else_is_closed_to_others(shm: Path) -> None:
    (shm / "cache").mkdir()
    (shm / "cache").chmod(0o777)
    assert disk(shm / "cache", 1 << 20, 0).status != "bad"
    DiskTier(shm / "cache").close()
    assert stat.S_IMODE((shm / "cache").stat().st_mode) == 0o755


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o2775, 0o770])
def test_where_others_may_write_the_cache_has_a_folder_of_its_own(
    shm: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lmcache")
    mount, own = shm / "mount", shm / "mount" / f"lmcache-{os.geteuid()}"
    mount.mkdir()
    (mount / "of somebody else").touch()
    mount.chmod(mode)
    found = disk(mount, 1 << 20, 0)
    assert found.status != "bad"
    assert str(own) in found.detail
    for number in range(2):
        tier = DiskTier(mount)
        assert tier.root == own
        put(tier, object_id(number))
        assert load(tier, object_id(0)) == payload_of(object_id(0))
        tier.flush(durable=True)
        tier.close()
    assert sorted(os.listdir(mount)) == [own.name, "of somebody else"]
    assert stat.S_IMODE(own.stat().st_mode) & 0o777 == 0o700
    assert stat.S_IMODE(mount.stat().st_mode) == mode
    assert "disk-folder-own" in caplog.text
    mount.chmod(0o700)
    assert DiskTier(mount).root == own, "it is still there when the mode has been corrected"
    assert DiskTier(own).root == own


@as_root
@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_several_users_can_name_one_folder_that_all_may_write_to(shm: Path, mode: int) -> None:
    mount = shm / "mount"
    mount.mkdir()
    mount.chmod(mode)
    shm.chmod(0o755)
    (mount / "else").touch()
    (mount / "objects").mkdir()  # of one who wants to keep the others out
    os.chown(mount / "objects", 1001, 1001)
    DiskTier(mount).close()
    program = (
        "import os; from lmcache.tiers.disk import DiskTier\n"
        "from lmcache_conformance.labs.tier_objects import load, object_id, payload_of, put\n"
        f"tier = DiskTier({str(shm / 'mine')!r}); put(tier, object_id(1)); load(tier, object_id(1)); tier.close()\n"
        f"os.setegid({OTHER}); os.seteuid({OTHER})  # who may not be able to import\n"
        f"tier = DiskTier({str(mount)!r}); put(tier, object_id(1)); print(tier.root)\n"
        "assert load(tier, object_id(1)) == payload_of(object_id(1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"{mount}/lmcache-{OTHER}\n", done.stderr
    tier = DiskTier(mount)
    assert tier.root == mount / "lmcache-0"
    assert load(tier, object_id(1)) is None
    tier.close()


@as_root
def test_a_folder_that_all_may_write_to_and_another_user_owns_is_refused(shm: Path) -> None:
    (shm / "theirs").mkdir()
    (shm / "theirs").chmod(0o1777)
    os.chown(shm / "theirs", OTHER, OTHER)
    with pytest.raises(TierError, match=f"belongs to uid {OTHER}"):
        DiskTier(shm / "theirs")
    assert os.listdir(shm / "theirs") == []


@as_root
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_of_our_name_that_another_user_made_is_refused(shm: Path, kind: str) -> None:
    mount, own = shm / "mount", shm / "mount" / "lmcache-0"
    mount.mkdir()
    mount.chmod(0o1777)
    own.symlink_to(shm) if kind == "link" else own.mkdir()
    os.chown(own, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(TierError, match=f"lmcache-0 (belongs to|is a symbolic link of) uid {OTHER}"):
        DiskTier(mount)
    assert disk(mount, 1 << 20, 0).status == "bad"


@as_root
def test_a_link_of_another_user_is_not_followed(shm: Path) -> None:
    (shm / "real").mkdir(mode=0o700)
    (shm / "link").symlink_to(shm / "real")
    DiskTier(shm / "link").close()
    os.chown(shm / "link", OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(TierError, match="symbolic link"):
        DiskTier(shm / "link")


def test_a_link_of_our_own_is_a_folder_like_any_other(shm: Path) -> None:
    (shm / "real").mkdir(mode=0o700)
    (shm / "link").symlink_to(shm / "real")
    tier = DiskTier(shm / "link")
    put(tier, object_id(1))
    tier.flush(durable=True)
    assert (shm / "real" / "objects" / relative_path(object_id(1))).exists()
    tier.close()


# ---------------------------------------------------------------- what is passed by


@as_root
def test_an_object_of_another_user_is_a_miss_and_counted_and_makes_way(shm: Path) -> None:
    tier = DiskTier(shm, timing=QUICK)
    put(tier, object_id(1))
    path = shm / "objects" / relative_path(object_id(1))
    path.write_bytes(stored_form(object_id(1)))
    os.chown(path, OTHER, OTHER)
    assert tier.contains([object_id(1)])[0].status is Status.MISSING
    assert load(tier, object_id(1)) is None
    assert list(tier.scan()) == []
    assert tier.foreign >= 2
    assert put(tier, object_id(1)).nbytes == SIZE
    assert load(tier, object_id(1)) == payload_of(object_id(1))
    tier.close()


@as_root
def test_a_namespace_of_another_user_neither_counts_nor_stops_eviction(shm: Path) -> None:
    """As an ordinary user, who cannot even list it."""
    theirs = shm / "objects" / (b"z" * 32).hex()
    program = f"""
import os, sys
sys.path[:] = {sys.path!r}
os.setgroups([]); os.setresgid(1001, 1001, 1001); os.setresuid(1001, 1001, 1001)
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.janitor import Timing
from lmcache_conformance.labs.tier_objects import object_id, put
tier = DiskTier({str(shm)!r}, 6 * {SIZE}, timing=Timing(tick=0.01, rescan=0.05, patience=2.0))
written = [put(tier, object_id(n)).status.name for n in range(30)].count("OK")
os.write(out, f"{{written}} {{tier.clear() > 0}} {{tier._janitor.foreign}}".encode())
"""
    shm.chmod(0o700)
    os.chown(shm, 1001, 1001)
    (shm / "objects").mkdir(mode=0o700)
    os.chown(shm / "objects", 1001, 1001)
    (theirs / "aa").mkdir(parents=True, mode=0o700)
    theirs.chmod(0o700)
    for name in ("usage", "janitor.lock"):
        (shm / name).touch(mode=0o600)
    DiskTier(shm / "warm").close()  # imports what the child, as another user, may be unable to read
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            out = os.open(shm / "out", os.O_CREAT | os.O_WRONLY, 0o600)
            exec(compile(program, "child", "exec"), {"out": out})
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    written, cleared, foreign = (shm / "out").read_text().split()
    assert (written, cleared) == ("30", "True")
    assert int(foreign) >= 1
    assert (shm / "usage").stat().st_uid == 1001
    assert theirs.is_dir()


# ---------------------------------------------------------------- folder.json


def test_a_folder_of_before_is_adopted(shm: Path) -> None:
    tier = DiskTier(shm)
    put(tier, object_id(1))
    tier.close()
    (shm / "folder.json").unlink()
    tier = DiskTier(shm, 1 << 20)
    assert load(tier, object_id(1)) == payload_of(object_id(1))
    assert record(shm) == {"format": 1, "uid": os.geteuid(), "capacity": 1 << 20, "clear_epoch": 0, "clears": []}
    assert stat.S_IMODE((shm / "folder.json").stat().st_mode) == 0o600
    tier.clear()
    assert record(shm)["clear_epoch"] == tier.clear_epoch == 1
    tier.clear(b"\xab")
    assert [what for what, _, _ in record(shm)["clears"]] == ["", "ab"]  # type: ignore[attr-defined]
    tier.close()


def test_the_capacity_given_last_holds_for_all(shm: Path) -> None:
    one = DiskTier(shm, 100 * SIZE, timing=QUICK)
    for number in range(40):
        put(one, object_id(number))
    other = DiskTier(shm, 10 * SIZE, timing=QUICK)
    wait(lambda: one.capacity_bytes == 10 * SIZE)
    wait(lambda: one.used_bytes() <= 10 * SIZE)
    for number in range(50, 70):
        assert put(one, object_id(number)).status is Status.OK
        assert put(other, object_id(number + 100)).status is Status.OK
    command = DiskTier(shm)  # `lmcache clear` and others give none
    assert command.capacity_bytes == 10 * SIZE
    for tier in (one, other, command):
        tier.close()


def test_a_default_does_not_replace_a_capacity_that_was_given(shm: Path) -> None:
    DiskTier(shm, 10 * SIZE).close()
    [tier] = open_tiers(Config(disk_path=shm), Metrics(), Throttle())
    assert tier.capacity_bytes == 10 * SIZE  # type: ignore[attr-defined]
    tier.close()
    [tier] = open_tiers(Config(disk_path=shm, disk_bytes="1GiB"), Metrics(), Throttle())
    assert tier.capacity_bytes == 1 << 30  # type: ignore[attr-defined]
    tier.close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"format":1,"uid":0,"capacity":-1,"clear_epoch":0}', b"[]"]
)
def test_a_damaged_record_is_written_anew(shm: Path, content: bytes) -> None:
    (shm / "folder.json").write_bytes(content)
    tier = DiskTier(shm, 1 << 20, timing=QUICK)
    assert record(shm)["capacity"] == 1 << 20
    (shm / "folder.json").write_bytes(content)
    wait(lambda: tier.capacity_bytes and (shm / "folder.json").stat().st_size > len(content))
    assert record(shm)["capacity"] == tier.capacity_bytes == 1 << 20
    tier.close()


def test_a_folder_of_a_newer_release_is_refused(shm: Path) -> None:
    (shm / "folder.json").write_text('{"format": 2, "owner": "x"}')
    with pytest.raises(TierError, match="newer release"):
        DiskTier(shm)
    assert disk(shm, 1 << 20, 0).status == "bad"
    assert (shm / "folder.json").read_text() == '{"format": 2, "owner": "x"}'


def test_a_record_that_is_another_name_of_a_file_is_not_written_to(shm: Path) -> None:
    (shm / "precious").write_text("mine")
    (shm / "folder.json").hardlink_to(shm / "precious")
    (shm / "usage").hardlink_to(shm / "precious")
    tier = DiskTier(shm, 1 << 20)
    assert put(tier, object_id(1)).status is Status.OK
    tier._janitor.collect()
    tier.close()
    assert (shm / "precious").read_text() == "mine"


# ---------------------------------------------------------------- clocks


@pytest.mark.parametrize("ahead", [3600.0, 10 * 365 * 86400.0])
def test_objects_from_the_future_are_evicted_in_their_turn(shm: Path, ahead: float) -> None:
    tier = DiskTier(shm, 10 * SIZE, timing=QUICK._replace(grain=0.05))
    for number in range(5):
        put(tier, object_id(number))
        path = shm / "objects" / relative_path(object_id(number))
        os.utime(path, (time.time() + ahead, time.time() + ahead))
    wait(lambda: all(path.stat().st_mtime < time.time() + 1 for path in (shm / "objects").rglob("*.safetensors")))
    time.sleep(0.1)
    for number in range(10, 30):
        assert put(tier, object_id(number)).status is Status.OK
    assert not any(found.id.depth < 5 for found in tier.scan())
    tier.close()


def test_a_stopped_janitors_lease_ends(shm: Path) -> None:
    """The holder is a stopped process; then it continues, and leaves the work to its successor."""
    program = (
        "import sys; from lmcache.tiers.disk import DiskTier; from lmcache.tiers.janitor import Timing\n"
        f"tier = DiskTier({str(shm)!r}, {10 * SIZE}, timing=Timing(tick=0.01))\n"
        "print(tier._janitor.holds_lock, flush=True); sys.stdin.readline(); import time; time.sleep(0.3)\n"
        "print(tier._janitor.holds_lock, flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert holder.stdout.readline() == "True\n"
        holder.send_signal(signal.SIGSTOP)
        tier = DiskTier(shm, 10 * SIZE, timing=QUICK._replace(lease=0.3))
        assert not tier._janitor.holds_lock
        wait(lambda: tier._janitor.holds_lock)
        for number in range(30):
            assert put(tier, object_id(number)).status is Status.OK
        holder.send_signal(signal.SIGCONT)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "False\n"
        assert tier._janitor.holds_lock
        tier.close()
    finally:
        holder.kill()
        holder.wait()


def test_a_lease_that_is_renewed_is_not_taken(shm: Path) -> None:
    one = DiskTier(shm, 10 * SIZE, timing=QUICK._replace(lease=0.3))
    wait(lambda: one._janitor.holds_lock)
    other = DiskTier(shm, 10 * SIZE, timing=QUICK._replace(lease=0.3))
    time.sleep(1.0)
    assert one._janitor.holds_lock
    assert not other._janitor.holds_lock
    one.close()
    wait(lambda: other._janitor.holds_lock)
    other.close()
