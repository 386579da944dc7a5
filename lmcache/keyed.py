"""The object-level API, for engines that have their own keys instead of tokens, such as SGLang's page hashes."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.engine import CacheEngine, Slots
from lmcache.keys import chain_of_keys
from lmcache.layout import PagedKV

__all__ = ["KeyedCache"]


class KeyedCache:
    """A `CacheEngine`'s cache, addressed by the caller's own keys.

    One key names the KV of `chunk_tokens` tokens; the engine must be opened with the page size as `chunk_tokens`. Keys form a
    sequence that ends at the first miss: `exists` and `load` return the number of *leading* keys found.

    Args:
        engine: the cache to use.
        scope: name of the caller's key scheme (`"sglang"`); keys of different scopes never collide.
        salt, lora: as in `CacheEngine.store`.
    """

    def __init__(self, engine: CacheEngine, *, scope: str, salt: str = "", lora: str = "") -> None:
        self._engine = engine
        self._namespace = {"salt": salt, "lora": lora, "scope": scope}

    def exists(self, keys: Sequence[str | bytes]) -> int:
        """Returns how many leading keys are cached, in any tier."""
        with self._engine.lookup_chain(chain_of_keys(self._engine.namespace(**self._namespace), keys)) as hit:
            return hit.tokens // self._engine.config.chunk_tokens

    def store(self, keys: Sequence[str | bytes], kv: PagedKV, slots: Slots) -> int:
        """Stores the objects; `slots` has `chunk_tokens` entries per key. Returns how many were newly accepted."""
        chain = chain_of_keys(self._engine.namespace(**self._namespace), keys)
        return self._engine.store_chain(chain, kv, slots) // self._engine.config.chunk_tokens

    def load(self, keys: Sequence[str | bytes], kv: PagedKV, slots: Slots) -> int:
        """Loads the objects into `slots`; returns how many leading keys were loaded. Slots beyond are undefined."""
        chunk = self._engine.config.chunk_tokens
        with self._engine.lookup_chain(chain_of_keys(self._engine.namespace(**self._namespace), keys)) as hit:
            return self._engine.retrieve(hit, kv, slots) // chunk
