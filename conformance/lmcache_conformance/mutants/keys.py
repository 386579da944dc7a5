"""Names that lack something, or depend on something they should not."""

from __future__ import annotations

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
    """An fp8 cache and a bf16 cache have one name."""

    def namespace(self, spec: KVSpec, **settings: Any) -> bytes:
        """Every plane counts as bf16."""
        groups = tuple(
            msgspec.structs.replace(g, planes=tuple(Plane(p.name, "bfloat16", p.elems) for p in g.planes))
            for g in spec.groups
        )
        return super().namespace(msgspec.structs.replace(spec, groups=groups), **settings)


@mutant(row=_KEY, project="SGLang #10969")
class MutantNoRank(KeyTests):
    """Every tensor-parallel rank calls its part by one name."""

    def object_id(self, name: Name, rect: Rect) -> ObjectId:
        """Heads left out."""
        return super().object_id(name, Rect(rect.layers, (0, 1)))


@mutant(row=_KEY, project="SGLang #26670")
class MutantNoStage(KeyTests):
    """Every pipeline or context-parallel rank calls its part by one name."""

    def object_id(self, name: Name, rect: Rect) -> ObjectId:
        """Layers left out."""
        return super().object_id(name, Rect((0, 1), rect.heads))


@mutant(row=_KEY, project="SGLang #37160")
class MutantNoLora(KeyTests):
    """A LoRA adapter is not part of the name."""

    def namespace(self, spec: KVSpec, *, lora: str = "", **settings: Any) -> bytes:
        """Left out."""
        return super().namespace(spec, **settings)


@mutant(row=_KEY, project="vLLM #42125")
class MutantLoraByNameLength(KeyTests):
    """Of a LoRA's digest only the beginning counts: another version of it has the same name."""

    def namespace(self, spec: KVSpec, *, lora: str = "", **settings: Any) -> bytes:
        """Sixteen characters."""
        return super().namespace(spec, lora=lora[:16], **settings)


@mutant(row=_KEY, project="LMCache #4825")
class MutantNoSalt(KeyTests):
    """All tenants share."""

    def namespace(self, spec: KVSpec, *, salt: str = "", **settings: Any) -> bytes:
        """Left out."""
        return super().namespace(spec, **settings)


@mutant(row=_KEY, project="LMCache #4825")
class MutantFieldsFlow(KeyTests):
    """Salt and LoRA are strung together."""

    def namespace(self, spec: KVSpec, *, salt: str = "", lora: str = "", **settings: Any) -> bytes:
        """One string."""
        return super().namespace(spec, salt=salt + lora, **settings)


@mutant(row="weights change under one name and old KV is served", project="hot reload, RL, LoRA reload")
class MutantNoWeightsVersion(KeyTests):
    """New weights, old name."""

    def namespace(self, spec: KVSpec, *, weights_version: str = "", **settings: Any) -> bytes:
        """Left out."""
        return super().namespace(spec, **settings)


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantNoNumerics(KeyTests):
    """What computed the bits is not part of the name."""

    def namespace(self, spec: KVSpec, *, share: str = "exact", **settings: Any) -> bytes:
        """Always as if sharing were semantic."""
        return super().namespace(spec, share="semantic", **settings)


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #2136")
class MutantHashSeed(KeyTests):
    """Python's `hash` of a string goes into the name."""

    def namespace(self, spec: KVSpec, *, salt: str = "", **settings: Any) -> bytes:
        """The salt by its hash."""
        return super().namespace(spec, salt=f"{hash(salt)}" if salt else "", **settings)


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #2511")
class MutantIdentity(KeyTests):
    """An object's address goes into the name."""

    _nothing = object()

    def namespace(self, spec: KVSpec, *, weights_version: str = "", **settings: Any) -> bytes:
        """`hash(object)` where nothing was given."""
        return super().namespace(
            spec, weights_version=weights_version or f"{hash(MutantIdentity._nothing)}", **settings
        )


@mutant(row="16-bit multimodal hash collides: the wrong image's KV", project="LMCache #3301")
class MutantShortImageHash(KeyTests):
    """Two bytes of an image's digest count."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        """The rest is zeros."""
        short = [extra._replace(digest=extra.digest[:2].ljust(16, b"\0")) for extra in extras]
        return super().chain(namespace, tokens, chunk_tokens, short)


@mutant(row="16-bit multimodal hash collides: the wrong image's KV", project="LMCache #3301")
class MutantPlaceholdersOnly(KeyTests):
    """Images are not part of the name: their placeholder tokens are all alike."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        """Left out."""
        return super().chain(namespace, tokens, chunk_tokens)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantNamesFromTheEnd(KeyTests):
    """Chunks are counted from the end of the prompt."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        """The tail's tokens first."""
        count = len(tokens) if hasattr(tokens, "__len__") else 0
        kept = tokens[count % chunk_tokens :] if count else tokens
        return super().chain(namespace, kept, chunk_tokens, extras)


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantChunksAlone(KeyTests):
    """A chunk is named by its own tokens: the same words behind another prompt are taken for it."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        """Each as if it were the first."""
        whole = super().chain(namespace, tokens, chunk_tokens, extras)
        parts = [tokens[i * chunk_tokens : (i + 1) * chunk_tokens] for i in range(len(whole))]
        return [super(MutantChunksAlone, self).chain(namespace, part, chunk_tokens)[0] for part in parts]


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantSixteenBitTokens(KeyTests):
    """Token ids are cut to 16 bits."""

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        """Low bits only."""
        super().chain(namespace, tokens, chunk_tokens, extras)  # refuses what are not tokens
        short = np.asarray(tokens, dtype=np.int64) & 0xFFFF
        return super().chain(namespace, short, chunk_tokens, extras)
