"""Model identity: identifies weights by their content rather than by their name.

A hub snapshot is identified by its commit; a local folder by its configuration, safetensors headers, file sizes and blocks
sampled from each file (`fingerprint="full"` hashes every byte). Digests are cached per user, keyed by path, inode, mtime and
size, so that a restart does not read gigabytes again.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs
from blake3 import blake3

from lmcache.errors import ConfigError, SpecError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_SAMPLES = 64
_BLOCK = 16 * 1024
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40,64})/?$")


def model_identity(model: str | os.PathLike[str], *, fingerprint: Literal["fast", "full"] = "fast") -> str:
    """Returns a string that differs whenever the weights differ.

    Args:
        model: a folder or file with weights, or a hub id (`org/name` or `org/name@revision`), which is resolved to its commit
            if it is in the local hub cache, and otherwise used as a plain name.
        fingerprint: `"fast"` samples 64 blocks of 16 KiB per file, `"full"` hashes every byte.

    Raises:
        SpecError: the folder contains no weights.
        ConfigError: `fingerprint` has another value.
    """
    if fingerprint not in ("fast", "full"):
        raise ConfigError(f"fingerprint must be 'fast' or 'full', not {fingerprint!r}")
    path = Path(model).expanduser()
    if not path.exists():
        commit = _hub_commit(str(model))
        return f"hub:{str(model).split('@')[0]}@{commit}" if commit else f"name:{model}"
    snapshot = _SNAPSHOT.search(path.absolute().as_posix())
    if snapshot and fingerprint == "fast":
        return f"hub:{snapshot['repo'].replace('--', '/')}@{snapshot['commit']}"
    files = _weight_files(path)
    digest = blake3(f"lmcache model {fingerprint}".encode())
    cache = _DigestCache()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        digest.update(cache.digest(file, fingerprint))
    cache.save()
    return f"{fingerprint}:{digest.hexdigest()}"


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(f for f in path.iterdir() if f.suffix in _WEIGHTS and f.is_file())
    if not files:
        raise SpecError(f"no weights in {path}: expected files ending in {', '.join(_WEIGHTS)}")
    config = path / "config.json"
    return ([config] if config.is_file() else []) + files


def _hub_commit(model: str) -> str | None:
    """Returns the commit of `org/name[@revision]` in the local hub cache, without importing the hub client."""
    name, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name) or ".." in revision:
        return None
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    with contextlib.suppress(OSError):
        commit = (hub / f"models--{name.replace('/', '--')}" / "refs" / (revision or "main")).read_text().strip()
        if re.fullmatch(r"[0-9a-f]{40,64}", commit):
            return commit
    return None


def _digest(file: Path, fingerprint: Literal["fast", "full"]) -> bytes:
    size = file.stat().st_size
    digest = blake3(size.to_bytes(8, "little"))
    if fingerprint == "full":
        return digest.update_mmap(file).digest()
    with file.open("rb") as handle:
        for offset, length in _sample(size, _header_bytes(handle.read(8), file, size)):
            handle.seek(offset)
            digest.update(handle.read(length))
    return digest.digest()


def _header_bytes(first: bytes, file: Path, size: int) -> int:
    """Returns the size of a safetensors header (names, shapes and dtypes of all tensors); 0 for other formats."""
    length = int.from_bytes(first, "little") + 8
    return length if file.suffix == ".safetensors" and length <= min(size, 100 << 20) else 0


def _sample(size: int, header: int) -> Iterator[tuple[int, int]]:
    yield 0, header
    if size - header <= _SAMPLES * _BLOCK:
        yield header, size - header
        return
    for i in range(_SAMPLES):
        yield header + (size - header - _BLOCK) * i // (_SAMPLES - 1), _BLOCK


class _DigestCache:
    """A per-user cache of file digests in one small JSON file; losing it only costs time."""

    def __init__(self) -> None:
        self._file = Path(platformdirs.user_cache_dir("lmcache")) / "fingerprints.json"
        self._known: dict[str, str] = {}
        self._changed = False
        with contextlib.suppress(OSError, msgspec.DecodeError):
            self._known = msgspec.json.decode(self._file.read_bytes(), type=dict[str, str])

    def digest(self, file: Path, fingerprint: Literal["fast", "full"]) -> bytes:
        stat = file.stat()
        key = f"{fingerprint} {stat.st_dev} {stat.st_ino} {stat.st_mtime_ns} {stat.st_size} {file.absolute()}"
        found = self._known.get(key)
        if found is not None:
            with contextlib.suppress(ValueError):
                return bytes.fromhex(found)
        digest = _digest(file, fingerprint)
        self._known[key] = digest.hex()
        self._changed = True
        return digest

    def save(self) -> None:
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            newest = dict(list(self._known.items())[-1000:])
            handle, name = tempfile.mkstemp(dir=self._file.parent)  # mode 0600
            with os.fdopen(handle, "wb") as out:
                out.write(msgspec.json.encode(newest))
            os.replace(name, self._file)
