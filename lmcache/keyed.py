"""The object-level API: for engines that bring their own keys instead of tokens, such as SGLang's page hashes."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.engine import CacheEngine, Slots
from lmcache.keys import chain_of_keys
from lmcache.layout import PagedKV

__all__ = ["KeyedCache"]


class KeyedCache:
    """KeyedCache of an engine's cache under keys of the caller's own.

    One key names the KV of `chunk_tokens` tokens; the engine is opened with the page size as `chunk_tokens`. Keys come in
    sequence, and a miss ends it: `exists` and `load` answer with how many *leading* keys are there.

    Args:
        engine: whose tiers to use.
        scope: names the caller's way of making keys (`"sglang"`), so that two ways never meet.
        salt, lora: as in `CacheEngine.store`.
    """

    def __init__(self, engine: CacheEngine, *, scope: str, salt: str = "", lora: str = "") -> None:
        self._engine = engine
        self._which = {"salt": salt, "lora": lora, "scope": scope}

    def exists(self, keys: Sequence[str | bytes]) -> int:
        """How many leading keys are held in some tier now."""
        with self._engine.lookup_chain(chain_of_keys(self._engine.namespace(**self._which), keys)) as hit:
            return hit.tokens // self._engine.config.chunk_tokens

    def store(self, keys: Sequence[str | bytes], kv: PagedKV, slots: Slots) -> int:
        """Keep the objects; `slots` has `chunk_tokens` entries per key. Returns how many were newly taken in."""
        chain = chain_of_keys(self._engine.namespace(**self._which), keys)
        return self._engine.store_chain(chain, kv, slots) // self._engine.config.chunk_tokens

    def load(self, keys: Sequence[str | bytes], kv: PagedKV, slots: Slots) -> int:
        """Copy the objects to `slots`; returns how many leading keys arrived. Slots beyond are undefined."""
        chunk = self._engine.config.chunk_tokens
        with self._engine.lookup_chain(chain_of_keys(self._engine.namespace(**self._which), keys)) as hit:
            return self._engine.retrieve(hit, kv, slots) // chunk
