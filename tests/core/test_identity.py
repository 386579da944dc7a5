"""Model identity depends on the weights, not on their name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmcache import identity
from lmcache.errors import ConfigError, SpecError
from lmcache.identity import model_identity


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "cache"


def write_model(folder: Path, *, value: float = 1.0, elements: int = 1000, config: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full(elements, value, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


def test_the_same_weights_in_two_folders_have_one_identity(tmp_path: Path) -> None:
    assert model_identity(write_model(tmp_path / "a")) == model_identity(write_model(tmp_path / "b"))


@pytest.mark.parametrize("change", [{"value": 2.0}, {"elements": 1001}, {"config": '{"rope_theta": 2}'}])
def test_other_weights_shapes_or_configuration_have_another(tmp_path: Path, change: dict[str, object]) -> None:
    assert model_identity(write_model(tmp_path / "a")) != model_identity(write_model(tmp_path / "b", **change))


def test_weights_replaced_under_one_name_are_noticed_though_remembered(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    before = model_identity(folder)
    file = folder / "model.safetensors"
    old = file.stat()
    write_model(folder, value=2.0)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert model_identity(folder) != before


def test_a_large_file_is_sampled_at_both_ends_and_fully_on_demand(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    data = bytearray(8 << 20)
    file.write_bytes(data)
    fast, full = model_identity(file), model_identity(file, fingerprint="full")
    data[-1] = 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    assert model_identity(file) != fast
    data[-1], data[len(data) // 2 + 77_777] = 0, 1  # between two samples
    file.write_bytes(data)
    os.utime(file, ns=(2, 2))
    assert model_identity(file, fingerprint="full") != full


def test_an_identity_is_computed_once_and_remembered_privately(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "a")
    first = model_identity(folder)
    monkeypatch.setattr(identity, "_digest", lambda *_: pytest.fail("was computed again"))
    assert model_identity(folder) == first
    [memory] = own_cache.rglob("fingerprints.json")
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600


def test_a_damaged_memory_costs_time_only(tmp_path: Path, own_cache: Path) -> None:
    folder = write_model(tmp_path / "a")
    first = model_identity(folder)
    [memory] = own_cache.rglob("fingerprints.json")
    for damage in (b"", b"{", b'{"a": 1}', b"\xff"):
        memory.write_bytes(damage)
        assert model_identity(folder) == first


def test_a_hub_id_is_resolved_to_the_commit_in_the_local_cache(tmp_path: Path, own_cache: Path) -> None:
    refs = own_cache / "huggingface" / "hub" / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    (refs / "v2").write_text("b" * 40)
    assert model_identity("org/name") == "hub:org/name@" + "a" * 40
    assert model_identity("org/name@v2") == "hub:org/name@" + "b" * 40
    assert model_identity("org/other") == "name:org/other"
    snapshot = refs.parent / "snapshots" / ("c" * 40)
    write_model(snapshot)
    assert model_identity(snapshot) == "hub:org/name@" + "c" * 40


def test_a_folder_without_weights_and_an_unknown_fingerprint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no weights"):
        model_identity(tmp_path)
    with pytest.raises(ConfigError, match="'fast' or 'full'"):
        model_identity("x", fingerprint="slow")  # type: ignore[arg-type]
