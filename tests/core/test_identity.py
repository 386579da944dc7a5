"""Model identity depends on the weights, not on their name."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Literal

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
def test_other_weights_shapes_or_configuration_have_another(tmp_path: Path, change: dict[str, Any]) -> None:
    assert model_identity(write_model(tmp_path / "a")) != model_identity(write_model(tmp_path / "b", **change))


def test_weights_replaced_under_one_mtime_are_noticed_though_remembered(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    before = model_identity(folder)
    file = folder / "model.safetensors"
    old = file.stat()
    with file.open("r+b") as handle:  # the same inode, size and mtime, as `rsync --inplace -t` leaves it
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\x01\x02\x03\x04")
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert file.stat().st_mtime_ns == old.st_mtime_ns
    assert model_identity(folder) != before


@pytest.mark.parametrize("where", [0, 77_777, 4 << 20, (8 << 20) - 1])
@pytest.mark.parametrize("fingerprint", ["fast", "full"])
def test_every_byte_counts(tmp_path: Path, where: int, fingerprint: Literal["fast", "full"]) -> None:
    one, other = tmp_path / "a" / "weights.bin", tmp_path / "b" / "weights.bin"
    data = bytearray(8 << 20)
    for file in (one, other):
        file.parent.mkdir()
        file.write_bytes(data)
        data[where] ^= 1
    assert model_identity(one, fingerprint=fingerprint) != model_identity(other, fingerprint=fingerprint)
    assert model_identity(one, fingerprint="fast") == model_identity(one)


@pytest.mark.parametrize(
    ("file", "separates"),
    [
        ("quantize_config.json", True),
        ("preprocessor_config.json", True),
        ("adapter_config.json", True),
        ("params.json", True),
        ("modeling_own.py", True),
        ("what_nobody_has_heard_of.json", True),
        ("generation_config.json", False),
        ("tokenizer_config.json", False),
        ("README.md", False),
    ],
)
def test_files_that_decide_values_count_and_others_do_not(tmp_path: Path, file: str, separates: bool) -> None:
    folder = write_model(tmp_path / "a")
    (folder / file).write_text('{"x": 1}')
    before = model_identity(folder)
    (folder / file).write_text('{"x": 2}')
    assert (model_identity(folder) != before) == separates


def test_a_shard_below_the_folder_counts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "sub/extra.bin"}}')
    with pytest.raises(SpecError, match=r"cannot read .*extra\.bin"):
        model_identity(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "extra.bin").write_bytes(b"1")
    before = model_identity(folder)
    (folder / "sub" / "extra.bin").write_bytes(b"2")
    assert model_identity(folder) != before


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


def test_a_hub_id_is_resolved_to_the_snapshot_in_the_local_cache(tmp_path: Path, own_cache: Path) -> None:
    hub = own_cache / "huggingface" / "hub" / "models--org--name"
    (hub / "refs").mkdir(parents=True)
    for ref, commit, value in (("main", "a" * 40, 1.0), ("v2", "b" * 40, 2.0)):
        (hub / "refs" / ref).write_text(commit)
        write_model(hub / "snapshots" / commit, value=value)
    main, second = (model_identity(write_model(tmp_path / str(value), value=value)) for value in (1.0, 2.0))
    assert model_identity("org/name") == main
    assert model_identity("org/name@v2") == model_identity("org/name", revision="v2") == second
    assert model_identity("org/name@" + "b" * 40) == second
    assert model_identity("org/name", hub_cache=hub.parent) == main
    write_model(hub / "snapshots" / ("a" * 40), value=2.0)
    assert model_identity("org/name") == second, "a snapshot edited in place keeps its identity"


@pytest.mark.parametrize(
    "name", ["org/other", "org/other@v1", "s3://bucket/model", "~no-such-user/a", "org/name\0", "/none"]
)
def test_what_cannot_be_looked_at_has_no_identity(name: str) -> None:
    with pytest.raises(SpecError, match="set model_identity"):
        model_identity(name)


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="revision 'v2'"):
        model_identity(write_model(tmp_path / "a"), revision="v2")


def test_a_folder_without_weights_and_an_unknown_fingerprint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no weights"):
        model_identity(tmp_path)
    with pytest.raises(ConfigError, match="'fast' or 'full'"):
        model_identity("x", fingerprint="slow")  # type: ignore[arg-type]
