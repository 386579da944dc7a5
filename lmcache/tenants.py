"""Remembers which namespaces a prompt was stored under, only to name the reason of a miss: another tenant's salt."""

from __future__ import annotations

from threading import Lock

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

_KEPT = 4096


class Tenants:
    """The namespaces under which the first chunk of recent prompts was stored. Bounded; keeps no tokens. Thread-safe."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk = chunk_tokens
        self._lock = Lock()
        self._seen: dict[bytes, set[bytes]] = {}

    def add(self, namespace: bytes, tokens: npt.NDArray[np.uint32]) -> None:
        """A prompt was stored under `namespace`."""
        beginning = self._beginning(tokens)
        with self._lock:
            if len(self._seen) >= _KEPT:
                self._seen.pop(next(iter(self._seen)))
            known = self._seen.setdefault(beginning, set())
            if len(known) < 2:  # two are enough to know for every namespace whether there is another
                known.add(namespace)

    def others(self, namespace: bytes, tokens: npt.NDArray[np.uint32]) -> bool:
        """Whether the beginning of these tokens was stored under another namespace."""
        return len(tokens) >= self._chunk and bool(self._seen.get(self._beginning(tokens), set()) - {namespace})

    def _beginning(self, tokens: npt.NDArray[np.uint32]) -> bytes:
        return xxh3_128_digest(tokens[: self._chunk].data)
