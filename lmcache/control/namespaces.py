"""Namespaces of one model's KV, by tenant and LoRA, and chains of prompts in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal

from lmcache.interrupts import uninterrupted
from lmcache.keys import Extra, TokenArray, chain_of, namespace_of, scoped
from lmcache.plan import Chain
from lmcache.spec import KVSpec

_KEPT = 1 << 16
"""Most namespaces that are remembered; bounds the memory of callers that use a new salt per request."""


class Namespaces:
    """Computes and remembers namespaces. Thread-safe.

    Args:
        spec: the model.
        chunk_tokens: tokens per chunk.
        share: see `lmcache.Config`.
        held: whether objects are held under a namespace.
    """

    def __init__(
        self,
        spec: KVSpec,
        chunk_tokens: int,
        share: Literal["exact", "semantic"],
        held: Callable[[bytes], bool] = lambda namespace: False,
    ) -> None:
        self._spec = spec
        self._chunk = chunk_tokens
        self._share = share
        self._held = held
        self._limit = _KEPT
        self._lock = threading.Lock()
        self._version = ""
        self._known: dict[tuple[str, str, str], bytes] = {}
        self._outdated: dict[
            tuple[str, bytes], None
        ] = {}  # (salt, namespace) of earlier weights versions, oldest first

    @property
    def weights_version(self) -> str:
        """The current weights version; empty until one is set."""
        return self._version

    def of(self, salt: str = "", lora: str = "", scope: str = "") -> bytes:
        """Returns the namespace of a tenant and LoRA under the current weights version.

        `scope` separates names that are not computed from tokens, see `lmcache.keyed`.
        """
        key = (salt, lora, scope)
        namespace = self._known.get(key)
        if namespace is None:
            with self._lock:  # so that no namespace of earlier weights is remembered after a change
                namespace = namespace_of(
                    self._spec,
                    chunk_tokens=self._chunk,
                    salt=salt,
                    lora=lora,
                    weights_version=self._version,
                    share=self._share,
                )
                if scope:
                    namespace = scoped(namespace, scope)
                if len(self._known) >= self._limit:
                    self._forget()
                self._known[key] = namespace
        return namespace

    def chain(self, tokens: TokenArray, salt: str = "", lora: str = "", extras: Sequence[Extra] = ()) -> Chain:
        """Returns the chain of the full chunks of a prompt; `tokens`: from `lmcache.keys.as_tokens`."""
        return chain_of(self.of(salt, lora), tokens, self._chunk, extras)

    def of_tenant(self, salt: str) -> list[bytes]:
        """Returns every namespace of this salt that this process has used, of any LoRA, scope and weights version."""
        self.of(salt)
        with self._lock:
            names = [namespace for (owner, *_), namespace in self._known.items() if owner == salt]
            return names + [namespace for owner, namespace in self._outdated if owner == salt]

    def _forget(self) -> None:
        """Forgets the oldest quarter of the names, except those under which objects are held: `of_tenant` must return these."""
        for key in list(self._known)[: len(self._known) // 4]:
            if not self._held(self._known[key]):
                del self._known[key]
        self._limit = max(_KEPT, len(self._known) + _KEPT // 4)

    @uninterrupted  # names of the old version must not stay known under the new one
    def set_weights_version(self, version: str) -> None:
        """Switches to other namespaces, after weights changed under the same model name (RL step, hot reload)."""
        with self._lock:
            self._version = version
            self._outdated |= {(salt, namespace): None for (salt, *_), namespace in self._known.items()}
            for key in list(self._outdated)[: max(0, len(self._outdated) - _KEPT)]:
                if not self._held(key[1]):
                    del self._outdated[key]
            self._known.clear()
