"""`lmcache doctor` reports problems, and its JSON contains the settings with their sources."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from clilab import Run, parsed

from lmcache.cli import doctor
from lmcache.config import Config
from lmcache.config.machine import memory_filesystem


def test_json_holds_findings_engines_and_settings_with_their_sources(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_IO_THREADS", "3")
    result = run("doctor", "--path", tmp_path, "--json")
    report = parsed(result)
    assert result.exit_code == 0
    assert report["ok"]
    names = {finding["name"] for finding in report["findings"]}
    assert names >= {"python", "package", "cpu", "gpu", "pinned memory", "platform", "memory", "disk"}
    assert report["settings"]["io_threads"] == {"value": 3, "source": "env LMCACHE_IO_THREADS"}
    assert report["settings"]["disk_path"] == {"value": str(tmp_path), "source": "explicit"}
    assert list(report["settings"]) == [s.name for s in Config.settings()]
    transformers = next(e for e in report["engines"] if e["name"] == "transformers")
    assert transformers == {
        "name": "transformers",
        "version": metadata.version("transformers"),
        "adapter": "lmcache_hf",
        "adapter_found": True,
    }
    assert list(tmp_path.iterdir()) == []  # the speed measurement cleans up


def test_people_see_every_setting_and_why_memory_is_not_pinned(run: Run) -> None:
    shown = run("doctor", "--quick", env={"COLUMNS": "160"}).stdout
    assert "pinned memory" in shown
    for setting in Config.settings():
        assert setting.name in shown


def test_a_wrong_setting_is_a_finding_and_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_TOKENZ", "1")
    result = run("doctor", "--json")
    report = parsed(result)
    assert (result.exit_code, report["ok"], report["settings"]) == (1, False, None)
    bad = [finding for finding in report["findings"] if finding["status"] == "bad"]
    assert len(bad) == 1
    assert "LMCACHE_CHUNK_TOKENS" in bad[0]["detail"]
    assert "LMCACHE_CHUNK_TOKENS" in run("doctor", "--quick", env={"COLUMNS": "200"}).stdout


def test_another_package_of_the_same_name_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.package_conflict().status == "ok"
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(version="0.5.6", name=name))
    found = doctor.package_conflict()
    assert found.status == "bad"
    assert "'lmcache' 0.5.6" in found.detail
    assert "pip uninstall" in found.advice


def test_the_disk_is_measured_and_nothing_is_made(tmp_path: Path) -> None:
    found = doctor.disk(tmp_path / "a/b", 1 << 20, 1 << 20)
    assert found.status == "ok"
    assert "will be created" in found.detail
    assert "GB/s" in found.detail
    assert list(tmp_path.iterdir()) == []
    assert "GB/s" not in doctor.disk(tmp_path, 1 << 20, 0).detail


def test_no_disk_tier_and_too_small_a_disk_are_notes(tmp_path: Path) -> None:
    assert doctor.disk(None, 1, 1).status == "note"
    found = doctor.disk(tmp_path, 1 << 60, 0)
    assert found.status == "note"
    assert "disk_bytes" in found.advice


def test_an_unwritable_or_full_disk_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.disk(tmp_path, 1, 1 << 60).status == "bad"

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = doctor.disk(tmp_path, 1, 0)
    assert found.status == "bad"
    assert "Permission denied" in found.detail


@pytest.mark.parametrize(
    ("reason", "status", "advice"),
    [
        (None, "ok", ""),
        ("no CUDA or ROCm device", "note", "pageable"),
        ("pinned allocation failed: x", "note", "ulimit -l"),
    ],
)
def test_pinned_memory_says_why_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, reason: str | None, status: str, advice: str
) -> None:
    monkeypatch.setattr("lmcache.memory.why_not_pinned", lambda: reason)
    found = next(f for f in parsed(run("doctor", "--quick", "--json"))["findings"] if f["name"] == "pinned memory")
    assert found["status"] == status
    assert advice in found["advice"]
    assert (reason or "available") in found["detail"]


def test_wsl_is_pointed_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.cli.doctor.is_wsl", lambda: True)
    found = next(f for f in parsed(run("doctor", "--quick", "--json"))["findings"] if f["name"] == "platform")
    assert found["status"] == "note"
    assert "WSL2" in found["detail"]


def test_a_folder_in_memory_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path.stat().st_dev
    mount = tmp_path / "proc/self/mountinfo"
    mount.parent.mkdir(parents=True)
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /somewhere rw,nosuid shared:9 - {{}} shm rw\n"
    for kind, found in (("tmpfs", "tmpfs"), ("ramfs", "ramfs"), ("ext4", None)):
        mount.write_text("22 1 0:99999 / /proc rw - proc proc rw\n" + line.format(kind))
        assert memory_filesystem(tmp_path, tmp_path) == found
    monkeypatch.setattr(doctor, "memory_filesystem", lambda path: "tmpfs")
    found = doctor.disk(tmp_path / "kv", 1 << 20, 0)
    assert found.status == "note"
    assert "tmpfs is memory, not a disk" in found.advice


def test_what_the_folder_holds_counts_against_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_filesystem", lambda path: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    assert "will be full before that" in doctor.disk(tmp_path, 12 << 20, 0).advice
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects/x.bin").write_bytes(b"x" * (4 << 20))
    assert doctor.disk(tmp_path, 12 << 20, 0).status == "ok"


def test_a_folder_that_cannot_be_looked_at_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    found = doctor.disk(tmp_path / "kv", 1 << 20, 0)
    assert (found.status, found.detail) == ("bad", f"{tmp_path}/kv; cannot be used: Permission denied")


def test_nothing_is_cut_off_in_a_narrow_terminal(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / ("[b]" + "x" * 60)
    shown = run("doctor", "--quick", "--path", folder, env={"COLUMNS": "40"}).stdout
    assert "…" not in shown
    assert shown.count("x") >= 120, "in the finding and in the setting"
