"""The file names in a disk tier's folder, and how a finished file is published under its name.

    <root>/objects/<namespace hex>/<first 2 hex of chain>/<chain hex>.<group>.L<a>-<b>.H<a>-<b>.<depth>.<tokens>.safetensors

The name is a pure function of the `ObjectId`, and the `ObjectId` can be parsed from it, so the folder needs no index: a
listing is enough. All other files are foreign: never served and never removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from lmcache.keys import ObjectId
from lmcache.spec import Rect

_NUMBER = "(0|[1-9][0-9]{0,18})"
_NAMESPACE = re.compile("([0-9a-f]{2}){1,32}")
_OBJECT = re.compile(
    rf"((?:[0-9a-f]{{2}}){{1,32}})\.{_NUMBER}\.L{_NUMBER}-{_NUMBER}\.H{_NUMBER}-{_NUMBER}\.{_NUMBER}\.{_NUMBER}\.safetensors"
)
_TEMP = re.compile(r"\.tmp-([0-9a-f]{16})-([0-9]{1,10})-[0-9a-f]{16}")

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_FUTURE_S = 60.0
"""Times further ahead than this come from a wrong clock."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Entry(NamedTuple):
    """One of our files. `temp`: a temporary file (not published yet, or left by a killed process) rather than an object."""

    path: str
    name: str
    temp: bool
    size: int
    used: float
    """Time of the last read or write, in seconds since 1970."""


def relative_path(id: ObjectId) -> str:
    """Returns the path of the object relative to `<root>/objects`."""
    chain, (l0, l1), (h0, h1) = id.chain.hex(), id.rect.layers, id.rect.heads
    return (
        f"{id.namespace.hex()}/{chain[:2]}/{chain}.{id.group}.L{l0}-{l1}.H{h0}-{h1}.{id.depth}.{id.tokens}.safetensors"
    )


def parse_path(namespace: str, shard: str, name: str) -> ObjectId | None:
    """Returns the id whose `relative_path` is `namespace/shard/name`, or None if there is none."""
    found = _OBJECT.fullmatch(name)
    if found is None or not name.startswith(shard) or not _NAMESPACE.fullmatch(namespace):
        return None
    chain, *numbers = found.groups()
    group, l0, l1, h0, h1, depth, tokens = map(int, numbers)
    return ObjectId(bytes.fromhex(namespace), bytes.fromhex(chain), group, Rect((l0, l1), (h0, h1)), tokens, depth)


def depth_of(name: str) -> int:
    """Returns the index of the chunk in its chain, parsed from an object's file name."""
    return int(name.rsplit(".", 3)[1])


def host_tag() -> str:
    """Returns 16 hex digits that identify this host's boot and pid namespace, within which process ids can be compared."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            text = f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        text = socket.gethostname()
    return xxhash.xxh3_64_hexdigest(text.encode())


def temp_name(tag: str) -> str:
    """Returns a unique name for a file that this process is about to write."""
    return f".tmp-{tag}-{os.getpid()}-{secrets.token_hex(8)}"


def is_stale(entry: Entry, tag: str, now: float, max_age: float) -> bool:
    """Returns whether a temporary file is abandoned: its process is dead (if that can be checked here), or it is older than
    `max_age` seconds.
    """
    found = _TEMP.fullmatch(entry.name)
    assert found is not None
    if now - entry.used > max_age:
        return True
    if found[1] != tag:
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


class Passed:
    """What a walk passed by.

    Args:
        uid: the owner of what is ours; None: everything is.

    Attributes:
        foreign: files and folders of other users.
        errors: why folders (of ours) could not be listed.
    """

    def __init__(self, uid: int | None = None) -> None:
        self.uid = uid
        self.foreign = 0
        self.errors: list[OSError] = []

    def is_foreign(self, status: os.stat_result) -> bool:
        """Returns whether another user owns something, and counts it."""
        foreign = self.uid is not None and status.st_uid != self.uid
        self.foreign += foreign
        return foreign

    def folders(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Yields the folders in `folder`, without those of other users."""
        for entry in self.listing(folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False) and not self.is_foreign(entry.stat(follow_symlinks=False)):
                    yield entry

    def listing(self, folder: str) -> list[os.DirEntry[str]]:
        """Lists a folder; none if that fails, which is noted."""
        try:
            return _listing(folder)
        except OSError as error:
            self.errors.append(error)
            return []


def walk(objects: str, namespace: bytes | None = None, passed: Passed | None = None) -> Iterator[Entry]:
    """Yields our files below `<root>/objects` (of one namespace). Files that disappear during the walk are skipped.

    Args:
        objects: the folder `objects`.
        namespace: only this one.
        passed: counts what is passed by because it belongs to another user or cannot be listed.

    Raises:
        OSError: `objects` cannot be listed or, without `passed`, a folder in it.
    """
    tolerant = passed is not None
    passed = passed or Passed()
    for space in _folders(objects):
        if not _NAMESPACE.fullmatch(space.name) or (namespace is not None and space.name != namespace.hex()):
            continue
        with contextlib.suppress(FileNotFoundError):
            if passed.is_foreign(space.stat(follow_symlinks=False)):
                continue
        for shard in passed.folders(space.path):
            entries = passed.listing(shard.path)
            if passed.errors and not tolerant:
                raise passed.errors[0]
            for entry in entries:
                temp = entry.name[0] == "."
                pattern = _TEMP if temp else _OBJECT
                if not pattern.fullmatch(entry.name) or not (temp or entry.name.startswith(shard.name)):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode) and not passed.is_foreign(status):
                    used = max(status.st_atime, status.st_mtime)
                    yield Entry(entry.path, entry.name, temp, status.st_size, used)
        if passed.errors and not tolerant:
            raise passed.errors[0]


def prune(objects: str, before: float) -> None:
    """Removes empty shard and namespace folders unchanged since `before` (seconds since 1970), or changed in the future."""
    future = time.time() + _FUTURE_S
    passed = Passed()
    for space in _folders(objects):
        if not _NAMESPACE.fullmatch(space.name):
            continue
        folders = [*passed.folders(space.path), space]
        with contextlib.suppress(OSError):
            # Read all times first: removing a folder changes its parent's.
            changed = [folder.stat(follow_symlinks=False).st_mtime for folder in folders]
            for folder, when in zip(folders, changed, strict=True):
                if when <= before or when > future:
                    with contextlib.suppress(OSError):
                        os.rmdir(folder.path)


def object_of(entry: Entry) -> ObjectId | None:
    """Returns the id of an entry yielded by `walk`."""
    rest, shard = os.path.split(os.path.dirname(entry.path))
    return parse_path(os.path.basename(rest), shard, entry.name)


def make_folders(root: str, folder: str) -> None:
    """Creates `folder` below `root`, and `root` itself, readable by the owner only. Existing folders are not changed."""
    if os.path.isdir(folder):
        return
    if folder != root:
        make_folders(root, os.path.dirname(folder))
    else:
        os.makedirs(os.path.dirname(root) or ".", exist_ok=True)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None


def publish(temp: str, path: str) -> None:
    """Renames a finished file from `temp` to `path`, atomically and without replacing an existing file.

    Raises:
        FileExistsError: `path` exists; nothing changed, `temp` still exists.
        FileNotFoundError: `temp` or the folder has been removed.
    """
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename_without_replacing(temp, path)
        return
    with contextlib.suppress(OSError):  # it is published; the janitor removes a leftover temporary name
        os.unlink(temp)


def _rename_without_replacing(temp: str, path: str) -> None:
    """Renames without hard links, for filesystems that lack them (exFAT, some FUSE and cloud mounts)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(temp), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), path)
    # Neither is supported. Two concurrent writers of one name may replace each other's file; both are complete and equal.
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.rename(temp, path)


def unlink(path: str) -> bool:
    """Removes a file. Returns False if it did not exist."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _listing(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _folders(folder: str) -> Iterator[os.DirEntry[str]]:
    return (entry for entry in _listing(folder) if entry.is_dir(follow_symlinks=False))
