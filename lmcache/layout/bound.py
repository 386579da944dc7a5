"""`BoundKV`: an engine's memory as addresses, ready to gather from and scatter to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lmcache.layout.axes import Axes
from lmcache.layout.native import native_layout
from lmcache.layout.objects import ObjectLayout
from lmcache.spec import KVSpec, Plane
from lmcache_kernels import PlaneAddress


@dataclass(frozen=True, eq=False)
class BoundGroup:
    """One layer group, compiled. `addresses[plane][layer]` index into `storages`, flat uint8 tensors.

    `runs`: the token axis has no pages of its own (a pool of tokens, or a page per sequence), so that an object is a run
    of tokens rather than a row of pages. `owners` are the memory as it was allocated, `storages` may be a window over it.
    """

    index: int
    planes: tuple[Plane, ...]
    addresses: tuple[tuple[PlaneAddress, ...], ...]
    storages: tuple[torch.Tensor, ...]
    owners: tuple[torch.Tensor, ...]
    heads: int
    pages: int
    block_tokens: int
    axes: tuple[Axes, ...]
    runs: bool
    plans: dict[object, Any] = field(default_factory=dict, repr=False)
    natives: dict[int, ObjectLayout] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> int:
        """Local layers of the group."""
        return len(self.addresses[0])

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self.pages * self.block_tokens


@dataclass(frozen=True, eq=False)
class BoundKV:
    """Engine tensors, checked against a spec and compiled to addresses. Made by `PagedKV.bind`."""

    spec: KVSpec
    groups: tuple[BoundGroup, ...]
    device: torch.device

    def num_slots(self, group: int = 0) -> int:
        """Slots of the group's pool; slot = block × block_tokens + offset."""
        return self.groups[group].num_slots

    def block_tokens(self, group: int = 0) -> int:
        """Tokens per page of the group."""
        return self.groups[group].block_tokens

    def native(self, group: int, tokens: int) -> ObjectLayout:
        """The dense arrangement that this engine's pages have, for an object of `tokens` tokens.

        Canonical where the engine's order is canonical anyway, or where `tokens` are no whole number of pages.
        """
        bound = self.groups[group]
        found = bound.natives.get(tokens)
        if found is None:
            found = bound.natives.setdefault(tokens, native_layout(self.spec, bound, tokens))
        return found
