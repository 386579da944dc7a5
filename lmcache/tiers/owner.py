"""Who may use a disk tier's folder, and the file `folder.json` that its processes agree on.

A folder belongs to one user. XXH3 detects damage, not malice, so nothing is served that another user could have written: the
folder and `objects` must belong to the user as whom this process creates files, and nobody else may write to them.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pwd
import shlex
import stat
import threading
import time
from collections.abc import Callable
from typing import Annotated

import msgspec

from lmcache.errors import TierError
from lmcache.observe.log import Throttle, info
from lmcache.tiers.folder import host_tag
from lmcache.tiers.usage import locked

FORMAT = 1
"""Version of the folder's structure that this release writes, and the newest it opens."""

RECORD = "folder.json"
_SIZE = 4096
"""Bytes of `folder.json`, padded with spaces: it is rewritten in place, by one call."""

_CLEARS = 30
"""Clears that are recorded by namespace. Who has missed more treats everything as cleared."""

_MAX_CLEARED = 4096
"""Namespaces whose last clear is remembered."""

_CONTENTS = frozenset({RECORD, "objects", "usage", "janitor.lock", "lost+found"})
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Clear(msgspec.Struct, frozen=True, array_like=True):
    """A clear: of a namespace in hex, or "" for everything; by a process of this `host_tag`; at this `time.monotonic()`."""

    what: str
    host: str
    at: float


class Record(msgspec.Struct, frozen=True):
    """The contents of `folder.json`.

    Attributes:
        format: version of the folder's structure.
        uid: the user whose objects these are; informative, the files' owner decides.
        capacity: limit on the folder's size in bytes for all processes; None: no limit.
        clear_epoch: how often objects were cleared.
        clears: the last clears, the newest last.
    """

    format: int = FORMAT
    uid: int = -1
    capacity: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] | None = None
    clear_epoch: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] = 0
    clears: tuple[Clear, ...] = ()

    def cleared(self, namespace: bytes | None) -> Record:
        """Returns the record after another clear, now."""
        clear = Clear("" if namespace is None else namespace.hex(), host_tag(), time.monotonic())
        clears = (*self.clears, clear)[-_CLEARS:]
        return msgspec.structs.replace(self, clear_epoch=self.clear_epoch + 1, clears=clears)

    def clears_since(self, epoch: int) -> dict[int, Clear]:
        """Returns the clears after `epoch`. If they are not all recorded: one of everything, under −1."""
        missed = self.clear_epoch - epoch
        if not 0 <= missed <= len(self.clears):  # negative: the folder was made anew
            return {-1: Clear("", "", 0.0)}
        first = self.clear_epoch - len(self.clears) + 1
        return {first + i: clear for i, clear in enumerate(self.clears) if first + i > epoch}


class _Version(msgspec.Struct):
    format: int


class FolderRecord:
    """This process's view of `<root>/folder.json`. Thread-safe.

    Args:
        root: the folder.
        uid: the user as whom this process creates files.
        every: seconds after which the file is read again.
        log: receives failures.
    """

    def __init__(self, root: str, uid: int, every: float, log: Throttle) -> None:
        self._path = os.path.join(root, RECORD)
        self._uid = uid
        self._every = every
        self._log = log
        self._now = Record(uid=uid)
        self._tag = host_tag()
        self._cleared: dict[str, float] = {}  # namespace in hex, or "" → when it was last cleared, at the latest
        self._data = b""  # of the file, as last read or written
        self._read_at = -float("inf")
        self._mutex = threading.RLock()

    def open(self, capacity: int | None, is_default: bool) -> None:
        """Creates or adopts the file and settles the capacity: the last one given explicitly applies to all processes.

        Raises:
            TierError: a newer release uses the folder.
        """
        found = self.update(lambda record: record)
        if capacity is not None and capacity != found.capacity and not (is_default and found.capacity is not None):
            self.update(lambda record: msgspec.structs.replace(record, capacity=capacity))
            if found.capacity is not None:
                self._log.warning("disk-capacity-changed", path=self._path, before=found.capacity, now=capacity)
        elif capacity is not None and capacity != found.capacity:
            info("disk-capacity-kept", path=self._path, default=capacity, now=found.capacity)

    def current(self) -> Record:
        """Returns the contents, at most `every` seconds old; the last known ones if the file cannot be read."""
        if time.monotonic() - self._read_at >= self._every:
            with self._mutex:
                self._read_at = time.monotonic()
                with contextlib.suppress(OSError, TierError):
                    fd = os.open(self._path, os.O_RDONLY | _OPEN)
                    try:
                        self._now = self._load(fd)
                    except (ValueError, msgspec.MsgspecError):
                        self.update(lambda record: record)  # damaged: write it again
                    finally:
                        os.close(fd)
        return self._now

    @property
    def known(self) -> Record:
        """The contents as of the last call that read them; no I/O."""
        return self._now

    def latest(self) -> Record:
        """Returns the contents, read now; the last known ones if the file cannot be read."""
        with contextlib.suppress(OSError, TierError):
            fd = os.open(self._path, os.O_RDONLY | _OPEN)
            try:
                data = os.pread(fd, _SIZE, 0)
            finally:
                os.close(fd)
            if data != self._data:
                return self.update(lambda record: record)  # reads under the lock: this may be half of a change
        return self._now

    def is_cleared_since(self, begun: float, namespace: bytes) -> bool:
        """Whether, as known, a namespace was cleared at or after `begun`.

        A clear by a process on another host, whose clock is not ours, counts as made when it is noticed.
        """
        return any(self._cleared.get(what, -math.inf) >= begun for what in ("", namespace.hex()))

    def update(self, change: Callable[[Record], Record]) -> Record:
        """Replaces the contents by what `change` returns for them. If the file cannot be written, only this process is affected.

        Raises:
            TierError: a newer release uses the folder.
        """
        with self._mutex:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | _OPEN, 0o600)
            except OSError:
                self._now = change(self._now)
                return self._now
            try:
                with locked(fd):
                    before: Record | None = None
                    try:
                        before = self._load(fd)
                    except (ValueError, msgspec.MsgspecError) as error:
                        if os.fstat(fd).st_size:
                            self._log.warning(
                                "disk-folder-record", path=self._path, detail=f"damaged, written anew: {error}"
                            )
                    if before is not None:
                        self._now = before
                    new = msgspec.structs.replace(change(self._now), format=FORMAT, uid=self._uid)
                    self._note_clears(new)
                    self._now = new
                    if self._now != before:
                        self._data = msgspec.json.encode(self._now).ljust(_SIZE - 1) + b"\n"
                        os.pwrite(fd, self._data, 0)
            except TierError:
                raise
            except OSError as error:
                self._log.warning("disk-folder-record", path=self._path, detail=str(error))
                self._now = change(self._now)
            finally:
                os.close(fd)
            return self._now

    def reset(self) -> None:
        """Replaces the mutex, for a forked child."""
        self._mutex = threading.RLock()

    def _load(self, fd: int) -> Record:
        """Reads the open file.

        Raises:
            ValueError, msgspec.MsgspecError: damaged.
            OSError: unreadable, or not a file of ours.
            TierError: written by a newer release.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != self._uid or status.st_nlink > 1:
            raise PermissionError(errno.EPERM, f"not a file of {user(self._uid)} with one name", self._path)
        data = os.pread(fd, _SIZE, 0)
        version = msgspec.json.decode(data, type=_Version).format
        if version > FORMAT:
            raise TierError(
                f"{self._path}: a newer release uses this folder (format {version}, this one knows {FORMAT}); "
                "upgrade lmcache-sdk, or choose another folder (disk_path)"
            )
        found = msgspec.json.decode(data, type=Record)
        self._data = data
        self._note_clears(found)
        return found

    def _note_clears(self, new: Record) -> None:
        """Notes what was cleared since the known record. The mutex must be held."""
        if new.clear_epoch != self._now.clear_epoch:
            for clear in new.clears_since(self._now.clear_epoch).values():
                at = clear.at if clear.host == self._tag else time.monotonic()
                self._cleared[clear.what] = max(at, self._cleared.get(clear.what, at))
            if len(self._cleared) > _MAX_CLEARED:
                self._cleared = {"": max(self._cleared.values())}


def user(uid: int) -> str:
    """Formats a user for messages: `uid 1000 (alice)`."""
    try:
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"uid {uid}"


def cache_folder(path: str | os.PathLike[str]) -> str:
    """Returns the folder that holds the cache of a configured `disk_path`: usually that.

    Where other users may write (`/tmp`, a tmpfs mounted without options, a Kubernetes `emptyDir`), it is a folder of our own
    in it, `lmcache-<uid>`, that nobody else may write to. Not if the cache was in the folder itself before others could write:
    it is then refused when it is opened.
    """
    uid, root = os.geteuid(), os.path.abspath(os.path.expanduser(path))
    own = os.path.join(root, f"lmcache-{uid}")
    try:
        link, status = os.lstat(root), os.stat(root)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISDIR(status.st_mode) or not {link.st_uid, status.st_uid} <= {0, uid}:
            return root  # its owner could put anything in the place of ours
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(os.path.join(root, "objects")).st_uid == uid:
                return root
        if os.path.lexists(own):
            return own
        if not mode & 0o022 or not os.access(root, os.W_OK | os.X_OK, effective_ids=True):
            return root
        if status.st_uid == uid and _is_private_use(root, mode):
            return root
    except OSError:
        return root  # whoever opens it says why it cannot be used
    return own


def check_folder(root: str, uid: int) -> bool:
    """Checks that `root` and `objects` in it, where they exist, belong to `uid` and that nobody else may write to them.

    Changes nothing. Returns whether only the mode of `root` has to be made stricter and `make_private` may do so.

    Raises:
        TierError: names the folder, its owner or mode, and what to do.
        OSError: a folder cannot be examined.
    """
    link = os.lstat(root)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, uid):
        raise TierError(
            f"{root} is a symbolic link of {user(link.st_uid)}, who could point it elsewhere; this process is {user(uid)}: "
            "set disk_path to the folder itself"
        )
    fixable = False
    for path in (root, os.path.join(root, "objects")):
        try:
            status = os.stat(path) if path == root else os.lstat(path)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            continue  # refused where it is opened
        mode, quoted = stat.S_IMODE(status.st_mode), shlex.quote(path)
        if status.st_uid != uid:
            inside = path == root and os.access(path, os.W_OK | os.X_OK, effective_ids=True)
            own = f"e.g. {os.path.join(root, f'lmcache-{uid}')}, " if inside else ""
            raise TierError(
                f"{path} belongs to {user(status.st_uid)}, and this process writes as {user(uid)}: a cache folder has one owner, "
                f"because its contents are trusted; set disk_path to a folder of your own, {own}run as its owner, or "
                f"take it over with `chown -R {uid} {shlex.quote(root)}` if you trust what is in it"
            )
        if mode & 0o022:
            if path == root and _is_private_use(root, mode):
                fixable = True
                continue
            raise TierError(
                f"{path} of {user(status.st_uid)} has mode {mode:04o}: other users may write to it and could replace cached "
                f"data; run `chmod go-w {quoted}`" + (", or set disk_path to a new folder" if path == root else "")
            )
        if path != root and not os.access(path, os.W_OK | os.X_OK | os.R_OK, effective_ids=True):
            raise TierError(f"{path} of {user(status.st_uid)} has mode {mode:04o}: run `chmod u+rwx {quoted}`")
    return fixable


def check_record(root: str) -> None:
    """Checks that this release understands `folder.json`, if there is one.

    Raises:
        TierError: it does not.
    """
    try:
        fd = os.open(os.path.join(root, RECORD), os.O_RDONLY | _OPEN)
        try:
            FolderRecord(root, os.fstat(fd).st_uid, math.inf, Throttle())._load(fd)
        finally:
            os.close(fd)
    except TierError:
        raise
    except (OSError, ValueError, msgspec.MsgspecError):
        return  # written anew when the tier opens


def make_private(root: str) -> None:
    """Withdraws others' permission to write to `root`, a folder of ours that is used for the cache only."""
    mode = stat.S_IMODE(os.stat(root).st_mode)
    os.chmod(root, mode & ~0o022)
    info("disk-folder-private", path=root, before=f"{mode:04o}", now=f"{mode & ~0o022:04o}")


def discard_foreign(root: str, uid: int) -> None:
    """Removes the small files of another user (who ran here once) from our folder; they are rebuilt.

    Raises:
        TierError: one cannot be removed.
    """
    for name in (RECORD, "usage", "janitor.lock"):
        path = os.path.join(root, name)
        try:
            status = os.lstat(path)
            if status.st_uid != uid and not stat.S_ISDIR(status.st_mode):
                os.unlink(path)
                info("disk-foreign-file-removed", path=path, owner=status.st_uid)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TierError(
                f"{path} belongs to another user and cannot be removed: {error.strerror}; remove it"
            ) from error


def _is_private_use(root: str, mode: int) -> bool:
    """Returns whether a folder holds nothing but a cache (or nothing), so that its mode may be changed."""
    if mode & stat.S_ISVTX:  # a folder like /tmp, shared on purpose
        return False
    return all(name in _CONTENTS or name.startswith(".tmp-") for name in os.listdir(root))
