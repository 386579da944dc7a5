"""The namespaces of one model's KV, by tenant and LoRA, and the chains of prompts in them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

from lmcache.keys import Extra, TokenArray, chain_of, namespace_of, scoped
from lmcache.plan import Chain
from lmcache.spec import KVSpec

_KEPT = 1 << 16
"""Namespaces remembered at most; a salt per request must not fill the memory."""


class Namespaces:
    """Makes and remembers namespaces. Thread-safe.

    Args:
        spec: the model.
        chunk_tokens: tokens per chunk.
        share: see `lmcache.Config`.
    """

    def __init__(self, spec: KVSpec, chunk_tokens: int, share: Literal["exact", "semantic"]) -> None:
        self._spec = spec
        self._chunk = chunk_tokens
        self._share = share
        self._lock = threading.Lock()
        self._version = ""
        self._known: dict[tuple[str, str, str], bytes] = {}
        self._outdated: list[tuple[str, bytes]] = []  # (salt, namespace) of earlier weights versions

    def of(self, salt: str = "", lora: str = "", scope: str = "") -> bytes:
        """The namespace of a tenant and LoRA under the current weights version.

        `scope` separates names that are not made from tokens, see `lmcache.keyed`.
        """
        key = (salt, lora, scope)
        found = self._known.get(key)
        if found is None:
            with self._lock:  # a name made for earlier weights must not be remembered once they have changed
                found = namespace_of(
                    self._spec,
                    chunk_tokens=self._chunk,
                    salt=salt,
                    lora=lora,
                    weights_version=self._version,
                    share=self._share,
                )
                if scope:
                    found = scoped(found, scope)
                if len(self._known) >= _KEPT:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = found
        return found

    def chain(self, tokens: TokenArray, salt: str = "", lora: str = "", extras: Sequence[Extra] = ()) -> Chain:
        """Names of every full chunk of a prompt; `tokens` comes from `lmcache.keys.as_tokens`."""
        return chain_of(self.of(salt, lora), tokens, self._chunk, extras)

    def of_tenant(self, salt: str) -> list[bytes]:
        """Every namespace of this salt that this process has used, whatever the LoRA, scope and weights version."""
        self.of(salt)
        with self._lock:
            names = [found for (owner, *_), found in self._known.items() if owner == salt]
            return names + [found for owner, found in self._outdated if owner == salt]

    def set_weights_version(self, version: str) -> None:
        """The weights changed under one name (RL step, hot reload): from here on other namespaces are used."""
        with self._lock:
            self._version = version
            self._outdated += [(salt, found) for (salt, *_), found in self._known.items()]
            del self._outdated[:-_KEPT]
            self._known.clear()
