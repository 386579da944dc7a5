"""Moves KV between a cache engine and a `DynamicCache`: loads its leading columns, and stores its contents afterwards."""

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
_ROUNDS = 8  # attempts to find a boundary shared by all rows; there may be none if paddings differ by parts of a chunk

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, (rows, kv heads, columns, elems)."""


@dataclass(frozen=True)
class Reuse:
    """The KV of one model in one engine, for one tenant.

    Attributes:
        salt: the tenant.
        lora: digest of the weights, if they differ from those that the engine was opened with.
    """

    engine: CacheEngine
    geometry: Geometry
    salt: str = ""
    lora: str = ""

    def load(self, prompt: Prompt, cache: DynamicCache) -> int:
        """Fills an armed, empty cache with the longest prefix that hits in every row.

        At least the last column is left to the model. The cache is modified only after everything is loaded.

        Returns:
            Number of columns filled, including padding.
        """
        stop = min(prompt.columns - 1, int(prompt.gaps().min()))
        if stop < 1:
            return 0
        with ExitStack() as leases:
            hits, columns = self._common_prefix(prompt, stop, leases)
            if columns == 0:
                return 0
            layers = self._allocate(prompt, columns, len(cache.layers))
            columns = self._retrieve(prompt, hits, columns, layers)
        if columns:
            compat.fill_all(cache.layers, layers, columns)
        return columns

    def hit_tokens(self, tokens: torch.Tensor) -> int:
        """Returns how many tokens of one sequence `load` would find."""
        with self._lookup(tokens, len(tokens) - 1) as hit:
            return hit.tokens

    def store(self, prompt: Prompt, cache: DynamicCache, first: int) -> int:
        """Stores every row of a cache that holds `prompt`.

        Args:
            prompt: prompt and generated tokens.
            cache: holds KV of all columns of `prompt`.
            first: columns from here on were computed in this call, not loaded.

        Returns:
            Number of tokens that the engine accepted.
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

    def _common_prefix(self, prompt: Prompt, stop: int, leases: ExitStack) -> tuple[list[Hit], int]:
        """Looks up all rows; returns their hits and the number of leading columns that all of them cover.

        With full attention, a row can use part of its hit. With a sliding window it cannot: the window before another boundary
        may not be cached, so all rows must end exactly where their hits end.
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
        """Allocates keys and values of every layer: uninitialised, or zeros if there are padding columns, which no load fills."""
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
        """Loads every row; returns how many columns were loaded, with sliding layers all or none."""
        paged = self._paged(layers)
        arrived = []
        for row, hit in enumerate(hits):
            if int(prompt.before[row, columns]) == 0:
                arrived.append(0)  # only padding up to here
                continue
            slots = {}
            for index, group in enumerate(self.geometry.groups):
                first = columns - min(columns, group.window or columns)
                slots[index] = prompt.slots(row, first=first, last=columns, count=hit.tokens)
            arrived.append(self.engine.retrieve(hit, paged, slots))
        whole = prompt.shared_columns(arrived, columns)
        return whole if whole == columns or not self.geometry.slides else 0

    def _held(self, layer: Any, columns: int, first: int) -> LayerKV:
        """Returns a layer's keys and values of columns [0, columns), or [first, columns) if it is sliding."""
        width = columns - first if compat.window_of(layer) else columns
        keys, values = (x[:, :, :width] for x in compat.columns_of(layer))  # the last step may have been undone
        if keys.shape[2] != width or values.shape[2] != width:
            raise ValueError(f"a layer holds {keys.shape[2]} columns, not {width}")
        return keys, values

    def _paged(self, layers: Sequence[LayerKV]) -> PagedKV:
        planes = [
            {"k": [layers[i][0] for i in group.layers], "v": [layers[i][1] for i in group.layers]}
            for group in self.geometry.groups
        ]
        return PagedKV(dict(enumerate(planes)), LAYOUT)
