"""File names, and publishing a file without replacing another one."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.keys import ObjectId
from lmcache.spec import Rect
from lmcache.tiers.folder import depth_of, make_folders, parse_path, publish, relative_path
from lmcache_conformance.labs.tier_objects import object_id

_SMALL = st.integers(0, 2**62)


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        ObjectId,
        st.binary(min_size=1, max_size=32),
        st.binary(min_size=1, max_size=32),
        _SMALL,
        st.builds(Rect, st.tuples(_SMALL, _SMALL), st.tuples(_SMALL, _SMALL)),
        _SMALL,
        _SMALL,
    )
)
def test_a_name_is_a_function_of_the_id_and_gives_it_back(id: ObjectId) -> None:
    path = relative_path(id)
    namespace, shard, name = path.split("/")
    assert parse_path(namespace, shard, name) == id
    assert depth_of(name) == id.depth
    assert len(name) <= 255


_GOOD = relative_path(object_id(7)).split("/")


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        (2, ".7.", ".07."),
        (2, ".7.", ".-7."),
        (2, ".7.", ".+7."),
        (2, ".7.", ".7_0."),
        (2, ".7.", ".٧."),
        (2, ".7.", "." + "9" * 20 + "."),
        (2, ".L", ".l"),
        (2, ".safetensors", ".safetensors\n"),
        (2, ".safetensors", ".SAFETENSORS"),
        (2, ".safetensors", ""),
        (2, _GOOD[1], _GOOD[1].swapcase() if not _GOOD[1].isdigit() else "zz"),
        (1, _GOOD[1], "00" if _GOOD[1] != "00" else "01"),
        (0, _GOOD[0][:2], "GG"),
        (0, _GOOD[0], _GOOD[0] * 2),
    ],
)
def test_a_name_that_is_not_exactly_right_is_foreign(part: int, old: str, new: str) -> None:
    parts = list(_GOOD)
    parts[part] = parts[part].replace(old, new, 1)
    assert parts != _GOOD
    assert parse_path(*parts) is None


def _two_files(shm: Path) -> tuple[str, str]:
    (shm / "temp").write_text("new")
    return str(shm / "temp"), str(shm / "name")


def _no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)


def _no_renameat2(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    class Library:
        if code is not None:

            @staticmethod
            def renameat2(*args: object) -> int:
                ctypes.set_errno(code)
                return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Library)


@pytest.mark.parametrize("how", ["link", "renameat2", "rename", "refused renameat2"])
def test_publishing_gives_the_name_and_drops_the_temporary_one(
    shm: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    temp, path = _two_files(shm)
    if how != "link":
        _no_links(monkeypatch)
    if how in ("rename", "refused renameat2"):
        _no_renameat2(monkeypatch, errno.EINVAL if how == "refused renameat2" else None)
    publish(temp, path)
    assert os.listdir(shm) == ["name"]
    assert Path(path).read_text() == "new"


@pytest.mark.parametrize("how", ["link", "renameat2", "rename"])
@pytest.mark.parametrize("there", ["file", "directory", "dangling link"])
def test_publishing_replaces_nothing(shm: Path, monkeypatch: pytest.MonkeyPatch, how: str, there: str) -> None:
    temp, path = _two_files(shm)
    if there == "file":
        Path(path).write_text("old")
    elif there == "directory":
        Path(path).mkdir()
    else:
        Path(path).symlink_to(shm / "nowhere")
    if how != "link":
        _no_links(monkeypatch)
    if how == "rename":
        _no_renameat2(monkeypatch, None)
    with pytest.raises(FileExistsError):
        publish(temp, path)
    assert sorted(os.listdir(shm)) == ["name", "temp"]
    assert there != "file" or Path(path).read_text() == "old"


def test_publishing_what_is_gone_says_so(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        publish(str(shm / "gone"), str(shm / "name"))
    _no_links(monkeypatch)
    with pytest.raises(FileNotFoundError):
        publish(str(shm / "gone"), str(shm / "name"))


def test_folders_are_made_for_the_owner_alone_and_existing_ones_kept(shm: Path) -> None:
    (shm / "open").mkdir(mode=0o755)
    make_folders(str(shm / "open"), str(shm / "open" / "a" / "b"))
    assert [oct((shm / "open" / part).stat().st_mode & 0o777) for part in ("", "a", "a/b")] == [
        "0o755",
        "0o700",
        "0o700",
    ]
    (shm / "open" / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        make_folders(str(shm / "open"), str(shm / "open" / "file" / "b"))
