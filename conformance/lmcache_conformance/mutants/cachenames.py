"""Caches whose keys lack something that changes values, or contain something that does not."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import Any

from lmcache import CacheEngine, PagedKV
from lmcache.engine import Hit, Slots
from lmcache.keys import Extra, Name, ObjectId
from lmcache.spec import Rect
from lmcache_conformance.mutants import mutant, only
from lmcache_conformance.mutants.brokencache import BrokenCacheTests


class _Names(CacheEngine):
    """Derives namespaces from `self.named(salt, lora)`."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        right = self._names.of

        def of(salt: str = "", lora: str = "", scope: str = "") -> bytes:
            return right(*self.named(salt, lora), self.scoped(scope))

        self._names.of = of  # type: ignore[method-assign]

    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return salt, lora

    def scoped(self, scope: str) -> str:
        return scope

    def clear(self, salt: str | None = None) -> int:
        return super().clear(None if salt is None else self.named(salt, "")[0])


class _NoSalt(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return "", lora


class _NoLora(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return salt, ""


class _ShortSalt(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return salt[:32], lora


class _NormalLora(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return salt, unicodedata.normalize("NFC", lora)


class _ShortScope(_Names):
    def scoped(self, scope: str) -> str:
        return scope[:32]


class _HashedSalt(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return str(hash(salt)), lora


class _ProcessInName(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return f"{salt}{os.getpid()}", lora


_KEY = "key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt"


@mutant(row=_KEY, project="LMCache #4825")
class MutantTenantsShare(BrokenCacheTests):
    """The salt is not part of the key."""

    cache_class = _NoSalt


@mutant(row=_KEY, project="SGLang #37160")
class MutantLorasShare(BrokenCacheTests):
    """The LoRA is not part of the key."""

    cache_class = _NoLora


@only(BrokenCacheTests.test_names_that_differ_late_or_little_share_nothing)
@mutant(row=_KEY, project="fields of fixed size")
class MutantShortSalts(BrokenCacheTests):
    """Only the first 32 characters of the salt are part of the key."""

    cache_class = _ShortSalt


@only(BrokenCacheTests.test_names_that_differ_late_or_little_share_nothing)
@mutant(row=_KEY, project="text that is normalised on the way")
class MutantNormalisedLoras(BrokenCacheTests):
    """LoRA names that Unicode regards as equivalent are one."""

    cache_class = _NormalLora


@only(BrokenCacheTests.test_every_salt_lora_and_scope_has_a_namespace_of_its_own)
@mutant(row=_KEY, project="fields of fixed size")
class MutantShortScopes(BrokenCacheTests):
    """Only the first 32 characters of a key scheme's name are part of the key."""

    cache_class = _ShortScope


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #2979")
class MutantHashedNames(BrokenCacheTests):
    """The key contains the salt's `hash`, which depends on PYTHONHASHSEED."""

    cache_class = _HashedSalt


@mutant(row="a new process on the same folder sees nothing", project="LMCache #1175")
class MutantProcessInTheName(BrokenCacheTests):
    """The process id is part of the key."""

    cache_class = _ProcessInName


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantAnyNumericsWillDo(BrokenCacheTests):
    """KV computed by another engine, backend or instruction set is a hit."""

    settings = {"share": "semantic"}  # noqa: RUF012


class _FrozenWeights(CacheEngine):
    def set_weights_version(self, version: str | int) -> None:
        pass


@mutant(row="weights change under one name and old KV is served", project="hot reload, RL, LoRA reload")
class MutantOldWeights(BrokenCacheTests):
    """New weights do not change the keys."""

    cache_class = _FrozenWeights


class _ShortImages(CacheEngine):
    def lookup(self, tokens: Any, *, extras: Sequence[Extra] = (), **names: Any) -> Hit:
        return super().lookup(tokens, extras=_shortened(extras), **names)

    def store(self, tokens: Any, kv: PagedKV, slots: Slots, *, extras: Sequence[Extra] = (), **names: Any) -> int:
        return super().store(tokens, kv, slots, extras=_shortened(extras), **names)


def _shortened(extras: Sequence[Extra]) -> list[Extra]:
    return [extra._replace(digest=extra.digest[:2].ljust(16, b"\0")) for extra in extras]


@mutant(row="16-bit multimodal hash collides: the wrong image's KV", project="LMCache #3301")
class MutantSixteenBitImages(BrokenCacheTests):
    """Only two bytes of an image's digest are part of the key."""

    cache_class = _ShortImages


class _RankBlind(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)

        def object_id(name: Name) -> ObjectId:
            return ObjectId.of(name, Rect((0, 1), (0, 1)))

        self._rank.transfer.tier_copier._object_id = object_id  # type: ignore[method-assign]


@mutant(row=_KEY, project="SGLang #10969")
class MutantRanksShare(BrokenCacheTests):
    """All tensor-parallel ranks read and write the same objects."""

    cache_class = _RankBlind
