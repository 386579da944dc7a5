"""How a transfer gets bytes in and out of engine memory: at once on the host, by streams on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lmcache.layout import BoundKV, ObjectLayout, gather, scatter

Arrival = Callable[[], None]
"""Blocks until the bytes are there. Called once, on a thread that may wait; raises what went wrong underway."""


class StagingFullError(Exception):
    """There is no room to store through now; the caller counts a skipped store and goes on."""


class Mover(Protocol):
    """Moves objects between engine memory and host buffers. Both calls return without waiting for a device."""

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> Arrival | None:
        """Engine → `outs`. On return, work enqueued later on the engine's stream may overwrite the source.

        None: the bytes are there. Otherwise `outs` must not be read before the arrival.

        Raises:
            StagingFullError: nothing was moved.
        """
        ...

    def load(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        group: int,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> Arrival | None:
        """`srcs` → engine. None: the bytes are there; otherwise `srcs` must stay as they are until the arrival."""
        ...


class HostMover:
    """Engine memory that the host reaches: `gather` and `scatter`, done when they return."""

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> None:
        """See `Mover`."""
        gather(kv, group, slots, outs, layout)

    def load(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        group: int,
        slots: torch.Tensor,
        layers: slice | None = None,
    ) -> None:
        """See `Mover`."""
        scatter(srcs, layout, kv, group, slots, layers)
