"""Hugging Face sessions, each broken in one way that has happened to somebody. `testing.mutants` runs the suite on them.

They break the adapter between engine and model; the model, its recomputation and everything below stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from msgspec import structs
from transformers import DynamicCache

from lmcache.engine import CacheEngine, Hit
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
    """Decodes from what the memory held before where a load has failed."""

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
    """After a load that failed midway, what did arrive is no longer what it was."""

    reuse = _SpoilsWhatArrived


class _ByLength:
    """An engine that is told how long a prompt is, not what it says."""

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
        return replace(super()._reuse(opened, digest, salt), engine=cast(CacheEngine, _ByLength(opened.engine)))


class NamesByLength(HFSession):
    """KV is found by how long a prompt is, not by what it says: another request's is served."""

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
    """A prefix's blocks are counted from the end of the prompt: what is stored for its beginning is its end."""

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
    """A hit restores full attention; sliding windows start out empty."""

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
    """What was offloaded comes back right the first time only."""

    reuse = _ServesOnce


class _StoresOneTooMany(ObservedModel):
    def _keep(self, prepared: Any, out: Any) -> None:
        for layer in prepared.cache.layers:
            layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=2)
            layer.values = torch.cat([layer.values, layer.values[:, :, -1:]], dim=2)
        super()._keep(prepared, out)


class StoresOneTooMany(HFSession):
    """The last sampled token, which was never run through the model, is stored as if it had KV."""

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
    """Two halves of the same shape, taken for each other."""

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
    """What comes from memory is right; what an earlier process wrote has its heads the other way round."""

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
    """A new process finds nothing of what others have written."""

    reuse, wrapper = _NamesByProcess, _NamedByProcess


class _NamedByHashSeed(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, f"{salt}{SEPARATOR}{hash('none')}")


class NamesByHashSeed(HFSession):
    """Names depend on PYTHONHASHSEED, which forks share and processes do not."""

    reuse, wrapper = _NamesByProcess, _NamedByHashSeed


class _KnowsNoTenants(ObservedModel):
    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        return super()._reuse(opened, digest, "")


class KnowsNoTenants(HFSession):
    """The salt is left out of the name."""

    wrapper = _KnowsNoTenants


class TrustsTheName(HFSession):
    """A model is what it is called, whatever its weights are now."""

    identity = "my-model"


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
    """Computes everything, and reports as a hit what it found."""

    reuse = _ReportsWhatItDoesNotUse


class WritesElsewhere(HFSession):
    """Leaves a copy of what it has answered in the working directory."""

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        responses = super().generate(requests, reuse=reuse)
        Path("answers.log").write_text(repr([response.tokens for response in responses]))
        return responses


class AlwaysShares(HFSession):
    """Uses other engines' KV whether or not anybody asked for that."""

    def __init__(self, config: SessionConfig) -> None:
        super().__init__(structs.replace(config, cache={**config.cache, "share": "semantic"}))


class ClearsMemoryOnly(HFSession):
    """`clear` returns, and the disk still serves."""

    def clear(self, salt: str | None = None) -> None:
        engine = self._cached.engine
        assert engine is not None
        tiers, engine._rank.tiers = engine._rank.tiers, []
        try:
            super().clear(salt)
        finally:
            engine._rank.tiers = tiers


class DeafToFullMemory(HFSession):
    """A store that finds no room is an error for whoever asked."""

    class _Wrapper(ObservedModel):
        def _keep(self, prepared: Any, out: Any) -> None:
            engine = self.engine
            assert engine is not None
            evicted = engine.stats()["index_evictions"]
            super()._keep(prepared, out)
            if engine.stats()["index_evictions"] > evicted:
                raise MemoryError("the RAM tier is full")

    wrapper = _Wrapper
