"""Hugging Face sessions, each broken in one way. `testing.mutants` runs the conformance suite on them.

They break the adapter between cache engine and model; the model, its recomputation and everything below the adapter are
unchanged. What each failure means is in `lmcache_conformance.mutants.engine_failures`; here is how this adapter gets it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from msgspec import structs
from transformers import DynamicCache

from lmcache.engine import CacheEngine, Hit
from lmcache.spec import Numerics
from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.labs.splits import Owner
from lmcache_hf import compat
from lmcache_hf.batch import Prompt
from lmcache_hf.reuse import LayerKV, Reuse
from lmcache_hf.testing.session import HFSession, ObservedModel, ObservedReuse

SEPARATOR = "\0"


@dataclass(frozen=True)
class _IgnoresFailedLoads(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        super()._retrieve(prompt, hits, columns, layers)
        return columns


class IgnoresFailedLoads(HFSession):
    """Reports every requested column as loaded, whatever the retrieval returns."""

    reuse = _IgnoresFailedLoads


@dataclass(frozen=True)
class _SpoilsWhatArrived(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        arrived = super()._retrieve(prompt, hits, columns, layers)
        if 0 < arrived < columns:
            for tensor in (tensor for layer in layers for tensor in layer):
                tensor[:, :, :arrived] = torch.roll(tensor[:, :, :arrived], 1, dims=3)
        return arrived


class SpoilsWhatArrived(HFSession):
    """Rotates the loaded columns by one element where a retrieval returns fewer columns than requested."""

    reuse = _SpoilsWhatArrived


class _ConstantTokens:
    """A cache engine that sees every prompt as repetitions of one token."""

    def __init__(self, engine: CacheEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def lookup(self, tokens: torch.Tensor, **more: Any) -> Hit:
        return self._engine.lookup(torch.full_like(tokens, 7), **more)

    def store(self, tokens: torch.Tensor, *more: Any, **named: Any) -> int:
        return self._engine.store(torch.full_like(tokens, 7), *more, **named)


class _NamedByLength(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return replace(super()._reuse(opened, digest, salt), engine=cast(CacheEngine, _ConstantTokens(opened.engine)))


class NamesByLength(HFSession):
    """Replaces every token by the same one in lookups and stores."""

    wrapper = _NamedByLength


@dataclass(frozen=True)
class _FromTheEnd(Prompt):
    chunk: int = 1

    def slots(self, row: int, *, first: int, last: int, count: int) -> torch.Tensor:
        slots = super().slots(row, first=first, last=last, count=count)
        return torch.roll(slots, -(count % self.chunk))


@dataclass(frozen=True)
class _TakesTheWrongEnd(ObservedReuse):
    def store(self, prompt: Prompt, cache: DynamicCache, first: int) -> int:
        return super().store(_FromTheEnd(prompt.ids, prompt.mask, self.engine.config.chunk_tokens), cache, first)


class TakesTheWrongEnd(HFSession):
    """Rotates the slots of a stored prompt to the left by the length of its partial last chunk."""

    reuse = _TakesTheWrongEnd


@dataclass(frozen=True)
class _ForgetsWindows(ObservedReuse):
    def load(self, prompt: Prompt, cache: DynamicCache) -> int:
        columns = super().load(prompt, cache)
        layers: list[Any] = cache.layers
        for layer in layers if columns else ():
            if compat.window_of(layer):
                layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
        return columns


class ForgetsWindows(HFSession):
    """Zeroes the layers with a sliding window after a load."""

    reuse = _ForgetsWindows


@dataclass(frozen=True)
class _ServesOnce(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        arrived = super()._retrieve(prompt, hits, columns, layers)
        if self.engine.stats()["lmcache_retrieve_seconds_count"] > 1:
            for keys, _ in layers:
                keys.zero_()
        return arrived


class ServesOnce(HFSession):
    """Zeroes the keys of every load but the first."""

    reuse = _ServesOnce


@dataclass(frozen=True)
class _Tires(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        arrived = super()._retrieve(prompt, hits, columns, layers)
        if self.engine.stats()["lmcache_retrieve_seconds_count"] > 64:
            for keys, _ in layers:
                keys.zero_()
        return arrived


class Tires(HFSession):
    """Zeroes the keys of every load from the 65th on."""

    reuse = _Tires


@dataclass(frozen=True)
class _EndsAt2048(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        arrived = super()._retrieve(prompt, hits, columns, layers)
        for tensor in (tensor for layer in layers for tensor in layer):
            tensor[:, :, 2048:].zero_()
        return arrived


class EndsAt2048(HFSession):
    """Zeroes the keys and values of a load beyond 2,048 columns."""

    reuse = _EndsAt2048


class _StoresOneTooMany(ObservedModel):
    def _keep(self, prepared: Any, out: Any) -> None:
        for layer in prepared.cache.layers:
            layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=2)
            layer.values = torch.cat([layer.values, layer.values[:, :, -1:]], dim=2)
        super()._keep(prepared, out)


class StoresOneTooMany(HFSession):
    """Stores the KV of the last processed token again, as that of the last sampled one."""

    wrapper = _StoresOneTooMany


@dataclass(frozen=True)
class _SwapsKeysAndValues(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        arrived = super()._retrieve(prompt, hits, columns, layers)
        for keys, values in layers:
            kept = keys.clone()
            keys.copy_(values)
            values.copy_(kept)
        return arrived


class SwapsKeysAndValues(HFSession):
    """Swaps the keys and values of what was loaded."""

    reuse = _SwapsKeysAndValues


@dataclass(frozen=True)
class _MisreadsTheDisk(ObservedReuse):
    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        arrived = super()._retrieve(prompt, hits, columns, layers)
        if any("disk" in hit.by_tier for hit in hits):
            for tensor in (tensor for layer in layers for tensor in layer):
                tensor.copy_(tensor.flip(1))
        return arrived


class MisreadsTheDisk(HFSession):
    """Reverses the order of the heads after a load from disk."""

    reuse = _MisreadsTheDisk


@dataclass(frozen=True)
class _NamesByProcess(ObservedReuse):
    @property
    def owner(self) -> Owner:
        return self.salt.partition(SEPARATOR)[0], self.lora


class _NamedByProcess(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, f"{salt}{SEPARATOR}{os.getpid()}")


class NamesByProcess(HFSession):
    """Appends the process id to the salt."""

    reuse, wrapper = _NamesByProcess, _NamedByProcess


class _NamedByHashSeed(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, f"{salt}{SEPARATOR}{hash('none')}")


class NamesByHashSeed(HFSession):
    """Appends the hash of a string to the salt."""

    reuse, wrapper = _NamesByProcess, _NamedByHashSeed


class _KnowsNoTenants(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, "")


class KnowsNoTenants(HFSession):
    """Passes an empty salt."""

    wrapper = _KnowsNoTenants


class _CutsSalts(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, salt[:32])


class CutsSalts(HFSession):
    """Passes the first 32 characters of the salt."""

    wrapper = _CutsSalts


class _NormalisesSalts(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, unicodedata.normalize("NFC", salt))


class NormalisesSalts(HFSession):
    """Passes the salt in Unicode's normal form."""

    wrapper = _NormalisesSalts


class _EndsSaltsAtNul(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, salt.partition("\0")[0])


class EndsSaltsAtNul(HFSession):
    """Passes the salt up to its first NUL."""

    wrapper = _EndsSaltsAtNul


class _Unmeasured(ObservedModel):
    def _measured(self, numerics: Numerics) -> Numerics:
        return numerics


class TrustsTheName(HFSession):
    """Uses a fixed `model_identity`, and does not look at what the weights compute."""

    identity = "my-model"
    wrapper = _Unmeasured


class _ReportsWhatItDoesNotUse(_IgnoresFailedLoads):
    def load(self, prompt: Prompt, cache: DynamicCache) -> int:
        self.seen.prompt = prompt.columns
        self.splits.began(self.owner, prompt.ids[0].tolist(), 0)
        with self._lookup(prompt.tokens(0), prompt.columns - 1) as hit:
            self.seen.columns, self.seen.by_tier = hit.tokens, hit.by_tier
        return 0

    def store(self, prompt: Prompt, cache: DynamicCache, first: int) -> int:
        return Reuse.store(self, prompt, cache, first)


class ReportsWhatItDoesNotUse(HFSession):
    """Looks up and records the hit, but loads nothing."""

    reuse = _ReportsWhatItDoesNotUse


class WritesElsewhere(HFSession):
    """Writes its answers to a file in the working directory."""

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        responses = super().generate(requests, reuse=reuse)
        Path("answers.log").write_text(repr([response.tokens for response in responses]))
        return responses


class AlwaysShares(HFSession):
    """Always sets `share="semantic"`, so that it loads other engines' KV."""

    def __init__(self, config: SessionConfig) -> None:
        super().__init__(structs.replace(config, cache={**config.cache, "share": "semantic"}))


class ClearsMemoryOnly(HFSession):
    """Hides the tiers from `clear`."""

    def clear(self, salt: str | None = None) -> None:
        engine = self._cached.engine
        assert engine is not None
        tiers, engine._rank.tiers = engine._rank.tiers, []
        try:
            super().clear(salt)
        finally:
            engine._rank.tiers = tiers


class DeafToFullMemory(HFSession):
    """Raises after a store that evicted something."""

    class _Wrapper(ObservedModel):
        def _keep(self, prepared: Any, out: Any) -> None:
            engine = self.engine
            assert engine is not None
            evicted = engine.stats()["index_evictions"]
            super()._keep(prepared, out)
            if engine.stats()["index_evictions"] > evicted:
                raise MemoryError("the RAM tier is full")

    wrapper = _Wrapper
