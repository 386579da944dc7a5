"""Model identity: identifies weights by their content rather than by their name.

A local folder, and a hub snapshot, is identified by every byte of its weights and of the configuration files that decide values.
Digests are cached per user, keyed by path, device, inode, size, mtime and ctime, so that a restart does not read gigabytes again.
What cannot be looked at (a hub id that is not on this machine, an `s3://` path) has no identity: a name alone says nothing about
content.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs
from blake3 import blake3

from lmcache.errors import ConfigError, SpecError
from lmcache.observe.log import info

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_DECIDES = (".json", ".yaml", ".yml", ".py")
_NEUTRAL = {
    "generation_config.json": "sampling defaults; KV does not depend on how tokens are chosen",
    "tokenizer.json": "names contain token ids, not text",
    "tokenizer_config.json": "names contain token ids, not text",
    "special_tokens_map.json": "names contain token ids, not text",
    "added_tokens.json": "names contain token ids, not text",
    "vocab.json": "names contain token ids, not text",
    "chat_template.json": "names contain token ids, not text",
    "trainer_state.json": "a training log",
    "all_results.json": "a training log",
    "train_results.json": "a training log",
    "eval_results.json": "a training log",
}
"""Files that end like configuration and provably do not change KV, each with the reason. Every other one separates."""

_HINT = "; pass a folder with the weights, or set model_identity to a name that changes whenever the weights do"


def model_identity(
    model: str | os.PathLike[str],
    *,
    fingerprint: Literal["fast", "full"] = "full",
    revision: str | None = None,
    hub_cache: str | os.PathLike[str] | None = None,
) -> str:
    """Returns a string that differs whenever the weights, or configuration files that decide values, differ.

    Args:
        model: a folder or file with weights, or a hub id (`org/name` or `org/name@revision`) whose snapshot is in the local hub
            cache.
        fingerprint: `"full"`. `"fast"`, which once sampled the files, is accepted and means the same.
        revision: of a hub id; instead of `@revision`.
        hub_cache: folder of the hub cache; by default the one that `HF_HUB_CACHE` and `HF_HOME` name.

    Raises:
        SpecError: the weights cannot be looked at: no such folder or snapshot, a remote path, a folder without weights, or a
            revision given for a folder.
        ConfigError: `fingerprint` has another value.
    """
    if fingerprint not in ("fast", "full"):
        raise ConfigError(f"fingerprint must be 'fast' or 'full', not {fingerprint!r}")
    if fingerprint == "fast":
        _log_fast()
    files = _files(model, revision, hub_cache)
    digest = blake3(b"lmcache model 2")
    cache = _DigestCache()
    for name, file in files:
        try:
            found = cache.digest(file)
        except OSError as error:
            raise SpecError(f"cannot read {file}: {error.strerror or error}{_HINT}") from error
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + found)
    cache.save()
    return f"content:{digest.hexdigest()}"


def file_stamps(model: str | os.PathLike[str]) -> tuple[tuple[str, int, int, int, int, int], ...]:
    """Returns the stamps (name, device, inode, size, mtime, ctime) of the files that decide `model_identity(model)`, unread.

    Raises:
        SpecError: as `model_identity`.
    """
    found = []
    for name, file in _files(model, None, None):
        try:
            found.append((name, *_stamp(file)))
        except OSError as error:
            raise SpecError(f"cannot read {file}: {error.strerror or error}{_HINT}") from error
    return tuple(found)


_fast_logged = False


def _log_fast() -> None:
    global _fast_logged
    if not _fast_logged:
        _fast_logged = True
        info("fingerprint-fast", detail="fingerprint: fast means full; every byte of the weights is read, once")


def _files(
    model: str | os.PathLike[str], revision: str | None, hub_cache: str | os.PathLike[str] | None
) -> list[tuple[str, Path]]:
    """Returns the files that decide the identity, with the names that they have in it."""
    try:
        path = Path(model).expanduser()
        found = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~user` without such a user
        raise SpecError(f"cannot look at {str(model)!r}: {error}{_HINT}") from error
    if not found:
        return _weight_files(_snapshot(str(model), revision, hub_cache))
    if revision:
        raise SpecError(f"revision {revision!r} is given for {path}, which is a local path and has no revisions{_HINT}")
    return _weight_files(path)


def _weight_files(path: Path) -> list[tuple[str, Path]]:
    """Returns weights and deciding configuration at the top of a folder, and what an index refers to below it."""
    try:
        if path.is_file():
            return [(path.name, path)]
        found = {f.name: f for f in path.iterdir() if f.suffix in _WEIGHTS + _DECIDES and f.is_file()}
        for name in [name for name in found if name.endswith(".index.json")]:
            with contextlib.suppress(msgspec.MsgspecError):
                shards = msgspec.json.decode(found[name].read_bytes(), type=_Index).weight_map.values()
                found.update({shard: path / shard for shard in set(shards)})
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}{_HINT}") from error
    if not any(name.endswith(_WEIGHTS) for name in found):
        raise SpecError(f"no weights in {path}: expected files ending in {', '.join(_WEIGHTS)}")
    return [(name, found[name]) for name in sorted(found) if name not in _NEUTRAL]


class _Index(msgspec.Struct):
    """`*.index.json` of a sharded checkpoint: the file of each tensor."""

    weight_map: dict[str, str] = {}  # msgspec copies it


def _snapshot(model: str, revision: str | None, hub_cache: str | os.PathLike[str] | None) -> Path:
    """Returns the folder of `org/name[@revision]` in the local hub cache, without importing the hub client."""
    name, _, tagged = model.partition("@")
    wanted = revision or tagged or "main"
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name) or ".." in wanted or wanted.startswith("/"):
        raise SpecError(f"{model!r} is neither a local path nor a hub id, so its content is unknown{_HINT}")
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    try:
        hub = Path(hub_cache or given or os.path.join(home, "hub")).expanduser()
    except RuntimeError as error:
        raise SpecError(f"cannot find the hub cache: {error}{_HINT}") from error
    folder = hub / f"models--{name.replace('/', '--')}"
    commit = wanted
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / wanted).read_text().strip()
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit) or not snapshot.is_dir():
        where = f"there is no such folder, and no snapshot of revision {wanted!r} in {hub}"
        raise SpecError(
            f"{model!r} is not on this machine ({where}), and a name alone does not identify weights{_HINT}"
        )
    return snapshot


def _stamp(file: Path) -> tuple[int, int, int, int, int]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest(file: Path) -> bytes:
    """Returns the digest of every byte, computed on all cores."""
    digest = blake3(max_threads=blake3.AUTO)
    if file.stat().st_size:
        digest.update_mmap(file)
    return digest.digest()


class _DigestCache:
    """A per-user cache of file digests in one small JSON file; losing it only costs time."""

    _lock = threading.Lock()

    def __init__(self) -> None:
        self._file = Path(platformdirs.user_cache_dir("lmcache")) / "fingerprints.json"
        self._known: dict[str, str] = self._read()
        self._new: dict[str, str] = {}

    def _read(self) -> dict[str, str]:
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, str])
        return {}

    def digest(self, file: Path) -> bytes:
        key = self._key(file)
        found = self._known.get(key, "")
        if re.fullmatch(r"[0-9a-f]{64}", found):
            return bytes.fromhex(found)
        for _ in range(3):
            digest = _digest(file)
            after = self._key(file)
            if after == key:
                self._new[key] = digest.hex()
                return digest
            key = after  # written to in the meantime
        raise SpecError(f"{file} changes while it is read{_HINT}")

    @staticmethod
    def _key(file: Path) -> str:
        return f"blake3 {' '.join(map(str, _stamp(file)))} {file.absolute()}"

    def save(self) -> None:
        if not self._new:
            return
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeEncodeError), self._lock:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            newest = dict(list((self._read() | self._new).items())[-1000:])
            encoded = msgspec.json.encode(newest)
            handle, name = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(encoded)
                os.replace(name, self._file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
