"""Between an engine and a `DynamicCache`: fill its first columns with what the engine holds, store what it holds after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from lmcache.engine import CacheEngine, Hit
from lmcache.layout import Layout, PagedKV
from lmcache_hf import compat
from lmcache_hf.batch import Prompt
from lmcache_hf.geometry import Geometry

LAYOUT = Layout.parse({"k": "batch head slot dim", "v": "batch head slot dim"})
_ROUNDS = 8  # of agreeing on a boundary; rows padded by unequal parts of a chunk may never agree

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, (rows, kv heads, columns, elems)."""


@dataclass(frozen=True)
class Reuse:
    """One model's cache in one engine, for one tenant and state of the weights."""

    engine: CacheEngine
    geometry: Geometry
    salt: str = ""
    lora: str = ""

    def load(self, prompt: Prompt, cache: DynamicCache) -> int:
        """Fill an armed, empty cache with the longest prefix that every row has; returns its columns, padding included.

        At least the last column is left to the model. The cache is touched only when all has arrived.
        """
        stop = min(prompt.columns - 1, int(prompt.gaps().min()))
        if stop < 1:
            return 0
        with ExitStack() as leases:
            hits, columns = self._agree(prompt, stop, leases)
            if columns == 0:
                return 0
            layers = self._allocate(prompt, columns, len(cache.layers))
            columns = self._retrieve(prompt, hits, columns, layers)
        if columns:
            for layer, (keys, values) in zip(cache.layers, layers, strict=True):
                kept = min(columns, compat.window_of(layer) or columns)
                compat.fill(layer, keys[:, :, :kept], values[:, :, :kept], columns)
        return columns

    def hit_tokens(self, tokens: torch.Tensor) -> int:
        """Tokens that `load` would find of one sequence."""
        with self._lookup(tokens, len(tokens) - 1) as hit:
            return hit.tokens

    def store(self, prompt: Prompt, cache: DynamicCache, first: int) -> int:
        """Store every row of a cache that holds `prompt` in its columns, of which it computed those from `first` on.

        Returns:
            Tokens that the engine took in.
        """
        layers = [self._held(layer, prompt.columns, first) for layer in cache.layers]
        paged = self._paged(layers)
        gaps = prompt.gaps().tolist()
        accepted = 0
        for row in range(prompt.rows):
            tokens = prompt.tokens(row)[: int(prompt.before[row, gaps[row]])]
            if len(tokens) < self.engine.config.chunk_tokens:
                continue
            slots = {
                index: prompt.slots(row, first=first if group.window else 0, last=prompt.columns, count=len(tokens))
                for index, group in enumerate(self.geometry.groups)
            }
            accepted += self.engine.store(tokens, paged, slots, salt=self.salt, lora=self.lora)
        return accepted

    # ------------------------------------------------------------------ steps of load

    def _lookup(self, tokens: torch.Tensor, limit: int) -> Hit:
        return self.engine.lookup(tokens, salt=self.salt, lora=self.lora, max_tokens=max(0, limit))

    def _agree(self, prompt: Prompt, stop: int, leases: ExitStack) -> tuple[list[Hit], int]:
        """Hits of all rows and the columns that they cover together.

        A full-attention row can use a part of its hit. A sliding row cannot: the window before any other boundary may not
        be held, so there all rows must end exactly on their hits.
        """
        for _ in range(_ROUNDS):
            limits = [int(n) for n in prompt.before[:, stop]]
            hits = [leases.enter_context(self._lookup(prompt.tokens(row), limit)) for row, limit in enumerate(limits)]
            columns = prompt.shared_columns([hit.tokens for hit in hits], stop)
            needs = [int(n) for n in prompt.before[:, columns]]
            exact = all(need in (0, hit.tokens) for need, hit in zip(needs, hits, strict=True))
            if columns == 0 or exact or not self.geometry.slides:
                return hits, columns
            for hit in hits:
                hit.release()
            stop = columns
        return [], 0

    def _allocate(self, prompt: Prompt, columns: int, layers: int) -> list[LayerKV]:
        """Uninitialised keys and values for every layer; zeros where padding will show through."""
        make = torch.empty if bool(prompt.mask[:, :columns].all()) else torch.zeros
        found: list[LayerKV | None] = [None] * layers
        for group in self.geometry.groups:
            kept = min(columns, group.window or columns)
            for layer in group.layers:
                keys, values = (
                    make(prompt.rows, group.heads, kept, elems, dtype=group.dtype, device=self.geometry.device)
                    for elems in (group.k_elems, group.v_elems)
                )
                found[layer] = (keys, values)
        return [kv for kv in found if kv is not None]

    def _retrieve(self, prompt: Prompt, hits: Sequence[Hit], columns: int, layers: Sequence[LayerKV]) -> int:
        """Load every row; returns the columns that really arrived, which for sliding layers is all or none."""
        paged = self._paged(layers)
        arrived = []
        for row, hit in enumerate(hits):
            if int(prompt.before[row, columns]) == 0:
                arrived.append(0)  # padding only so far
                continue
            slots = {}
            for index, group in enumerate(self.geometry.groups):
                first = columns - min(columns, group.window or columns)
                slots[index] = prompt.slots(row, first=first, last=columns, count=hit.tokens)
            arrived.append(self.engine.retrieve(hit, paged, slots))
        whole = prompt.shared_columns(arrived, columns)
        return whole if whole == columns or not self.geometry.slides else 0

    def _held(self, layer: Any, columns: int, first: int) -> LayerKV:
        """What a layer holds of columns [0, columns), or of those from `first` on if it slides."""
        width = columns - first if compat.window_of(layer) else columns
        keys, values = (x[:, :, :width] for x in compat.columns_of(layer))  # a step may have been taken back at the end
        if keys.shape[2] != width or values.shape[2] != width:
            raise ValueError(f"a layer holds {keys.shape[2]} columns, not {width}")
        return keys, values

    def _paged(self, layers: Sequence[LayerKV]) -> PagedKV:
        planes = [
            {"k": [layers[i][0] for i in group.layers], "v": [layers[i][1] for i in group.layers]}
            for group in self.geometry.groups
        ]
        return PagedKV(dict(enumerate(planes)), LAYOUT)
