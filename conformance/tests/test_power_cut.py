"""`labs.power_cut` keeps what a program has synced, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_conformance.labs import power_cut

pytestmark = pytest.mark.skipif(power_cut.why_not() is not None, reason=f"{power_cut.why_not()}")

HEAD = """
import mmap, os, sqlite3, sys, threading, time
from lmcache_conformance.labs.power_cut import cut, hold, watched
def write(name, data, sync=False):
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
def sync(folder="."):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
watched()
"""


def left(folder: Path, program: str) -> list[dict[str, bytes]]:
    """Returns what each `cut` of a program that works in an empty folder leaves there: path → bytes."""
    place, copies = folder / "place", folder / "copies"
    place.mkdir()
    command = [sys.executable, power_cut.__file__, str(place), str(copies), sys.executable, "-c", HEAD + program]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [
        {str(path.relative_to(cut)): path.read_bytes() for path in cut.rglob("*") if path.is_file()}
        for cut in sorted(copies.iterdir())
    ]


def test_bytes_and_names_are_kept_once_both_are_synced(tmp_path: Path) -> None:
    program = """
write("a", b"first", sync=True); cut()
sync(); cut()
write("a", b"second"); cut()
os.rename("a", "b"); cut()
sync(); cut()
write("b", b"third"); os.sync(); cut()
"""
    wanted = [{}, {"a": b"first"}, {"a": b"first"}, {"a": b"first"}, {"b": b"first"}, {"b": b"third"}]
    assert left(tmp_path, program) == wanted


def test_a_file_that_was_never_synced_is_empty_and_a_folder_needs_its_own_sync(tmp_path: Path) -> None:
    program = """
os.mkdir("d"); write("d/a", b"x", sync=True); write("b", b"y"); sync(); cut()
sync("d"); cut()
"""
    assert left(tmp_path, program) == [{"b": b""}, {"b": b"", "d/a": b"x"}]


def test_what_a_mapping_has_synced_is_kept(tmp_path: Path) -> None:
    program = """
write("a", bytes(4096), sync=True); sync()
with open("a", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
    mapped[:1] = b"x"; cut()
    mapped.flush(); cut()
"""
    assert [cut["a"][:1] for cut in left(tmp_path, program)] == [b"\0", b"x"]


def test_syncs_of_other_threads_processes_and_libraries_count(tmp_path: Path) -> None:
    program = """
def work():
    write("a", b"x", sync=True); sync()
thread = threading.Thread(target=work); thread.start(); thread.join(); cut()
if not (pid := os.fork()):
    write("b", b"y", sync=True); sync(); os._exit(0)
os.waitpid(pid, 0); cut()
for name, mode in (("full", "FULL"), ("off", "OFF")):
    db = sqlite3.connect(name); db.execute(f"PRAGMA synchronous={mode}")
    db.execute("CREATE TABLE t (x)"); db.execute("INSERT INTO t VALUES (1)"); db.commit(); db.close()
sync(); cut()
"""
    threads, processes, libraries = left(tmp_path, program)
    assert threads == {"a": b"x"}
    assert processes == {"a": b"x", "b": b"y"}
    assert libraries["full"].startswith(b"SQLite")
    assert libraries["off"] == b""


def test_a_held_sync_lets_others_overtake_it(tmp_path: Path) -> None:
    program = """
hold()
thread = threading.Thread(target=write, args=("a", b"x", True)); thread.start()
while not os.path.exists("a") or not os.path.getsize("a"):
    time.sleep(0.01)
time.sleep(0.2); sync(); cut()
thread.join(); cut()
"""
    assert left(tmp_path, program) == [{"a": b""}, {"a": b"x"}]


def test_the_programs_exit_status_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="own words"):
        left(tmp_path, "raise SystemExit('own words')")
