"""Keys that lack something, or depend on something they should not."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from lmcache.keys import Extra, Name, ObjectId
from lmcache.spec import KVSpec, Plane, Rect
from lmcache_conformance.mutants import mutant
from lmcache_conformance.suites.keys import CHUNK, KeyTests

_KEY = "key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt"


@mutant(row=_KEY, project="SGLang #33268")
class MutantNoDtype(KeyTests):
    """The dtype is not part of the key: fp8 and bf16 caches share it."""

    def namespace(self, spec: KVSpec, **settings: Any) -> bytes:
        groups = tuple(
            msgspec.structs.replace(g, planes=tuple(Plane(p.name, "bfloat16", p.elems) for p in g.planes))
            for g in spec.groups
        )
        return super().namespace(msgspec.structs.replace(spec, groups=groups), **settings)


@mutant(row=_KEY, project="SGLang #10969")
class MutantNoRank(KeyTests):
    """The range of heads is not part of the key: tensor-parallel ranks share it."""

    def object_id(self, name: Name, rect: Rect) -> ObjectId:
        return super().object_id(name, Rect(rect.layers, (0, 1)))


@mutant(row=_KEY, project="SGLang #26670")
class MutantNoStage(KeyTests):
    """The range of layers is not part of the key: pipeline- and context-parallel ranks share it."""

    def object_id(self, name: Name, rect: Rect) -> ObjectId:
        return super().object_id(name, Rect((0, 1), rect.heads))


@mutant(row=_KEY, project="SGLang #37160")
class MutantNoLora(KeyTests):
    """The LoRA adapter is not part of the key."""

    def namespace(self, spec: KVSpec, *, lora: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, **settings)


@mutant(row=_KEY, project="vLLM #42125")
class MutantLoraByNameLength(KeyTests):
    """Only the first 16 characters of a LoRA's digest are part of the key, so that versions of it can share one."""

    def namespace(self, spec: KVSpec, *, lora: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, lora=lora[:16], **settings)


@mutant(row=_KEY, project="text that is normalised on the way")
class MutantNormalisedLora(KeyTests):
    """LoRA names that Unicode regards as equivalent are one."""

    def namespace(self, spec: KVSpec, *, lora: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, lora=unicodedata.normalize("NFC", lora), **settings)


@mutant(row=_KEY, project="LMCache #4825")
class MutantNoSalt(KeyTests):
    """The salt is not part of the key."""

    def namespace(self, spec: KVSpec, *, salt: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, **settings)


@mutant(row=_KEY, project="LMCache #4825")
class MutantFieldsFlow(KeyTests):
    """Salt and LoRA are concatenated without a separator."""

    def namespace(self, spec: KVSpec, *, salt: str = "", lora: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, salt=salt + lora, **settings)


@mutant(row="weights change under one name and old KV is served", project="hot reload, RL, LoRA reload")
class MutantNoWeightsVersion(KeyTests):
    """The version of the weights is not part of the key."""

    def namespace(self, spec: KVSpec, *, weights_version: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, **settings)


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantNoNumerics(KeyTests):
    """The numerics (engine, backend, instruction set) are not part of the key."""

    def namespace(self, spec: KVSpec, *, share: str = "exact", **settings: Any) -> bytes:
        return super().namespace(spec, share="semantic", **settings)


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #2136")
class MutantHashSeed(KeyTests):
    """The key contains Python's `hash` of the salt."""

    def namespace(self, spec: KVSpec, *, salt: str = "", **settings: Any) -> bytes:
        return super().namespace(spec, salt=f"{hash(salt)}" if salt else "", **settings)


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #2511")
class MutantIdentity(KeyTests):
    """The key contains an object's `hash`, its address, where no version is given."""

    _nothing = object()

    def namespace(self, spec: KVSpec, *, weights_version: str = "", **settings: Any) -> bytes:
        return super().namespace(
            spec, weights_version=weights_version or f"{hash(MutantIdentity._nothing)}", **settings
        )


@mutant(row="16-bit multimodal hash collides: the wrong image's KV", project="LMCache #3301")
class MutantShortImageHash(KeyTests):
    """Only two bytes of an image's digest are part of the key."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        short = [extra._replace(digest=extra.digest[:2].ljust(16, b"\0")) for extra in extras]
        return super().chain(namespace, tokens, chunk_tokens, short)


@mutant(row="16-bit multimodal hash collides: the wrong image's KV", project="LMCache #3301")
class MutantPlaceholdersOnly(KeyTests):
    """Images are not part of the key: their placeholder tokens are all equal."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        return super().chain(namespace, tokens, chunk_tokens)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantNamesFromTheEnd(KeyTests):
    """Chunks are counted from the end of the prompt; the partial chunk is the first."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        count = len(tokens) if hasattr(tokens, "__len__") else 0
        kept = tokens[count % chunk_tokens :] if count else tokens
        return super().chain(namespace, kept, chunk_tokens, extras)


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantChunksAlone(KeyTests):
    """A chunk's key depends on its own tokens only, not on the prefix before it."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        whole = super().chain(namespace, tokens, chunk_tokens, extras)
        parts = [tokens[i * chunk_tokens : (i + 1) * chunk_tokens] for i in range(len(whole))]
        return [super(MutantChunksAlone, self).chain(namespace, part, chunk_tokens)[0] for part in parts]


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantSixteenBitTokens(KeyTests):
    """Token ids are truncated to 16 bits."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        super().chain(namespace, tokens, chunk_tokens, extras)  # raises for invalid tokens
        short = np.asarray(tokens, dtype=np.int64) & 0xFFFF
        return super().chain(namespace, short, chunk_tokens, extras)
