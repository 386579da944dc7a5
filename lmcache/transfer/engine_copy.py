"""How a transfer gets bytes in and out of engine memory: at once on the host, by streams on a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lmcache.layout import BoundKV, ObjectLayout, gather, scatter
from lmcache.layout.rows import row_copies
from lmcache.layout.slots import check_slots
from lmcache.observe.log import info
from lmcache_kernels import DMA_BYTES, RowCopy
from lmcache_kernels import pipeline as arrivals
from lmcache_kernels.dispatch import copy_one, give_up, served_by_torch
from lmcache_kernels.dma import Dma, Memory, find_driver
from lmcache_kernels.pipeline import CopyEngine, ObjectShape, Pipeline
from lmcache_kernels.rowcopy import Ints
from lmcache_kernels.streams import TorchStreams

Completion = Callable[[], None]
"""Blocks until the bytes are there. Called once, on a thread that may wait; raises what went wrong underway."""


_ALONE_BYTES = 1 << 20


class StagingFullError(Exception):
    """There is no room to store through now; the caller counts a skipped store and goes on."""


class EngineCopier(Protocol):
    """Moves objects between engine memory and host buffers. No call waits for a device."""

    def now(self) -> object:
        """This point of the engine's stream, for `load(after=…)`."""
        ...

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> Completion | None:
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
        after: object = None,
    ) -> Completion | None:
        """`srcs` → engine, once its stream has passed `after` (default: now), from when on the pages are free.

        None: the bytes are there; otherwise `srcs` must stay as they are until the arrival.
        """
        ...


class HostCopier:
    """Engine memory that the host reaches: `gather` and `scatter`, done when they return."""

    def now(self) -> None:
        """See `EngineCopier`."""

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> None:
        """See `EngineCopier`."""
        gather(kv, group, slots, outs, layout)

    def load(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        group: int,
        slots: torch.Tensor,
        after: object = None,
    ) -> None:
        """See `EngineCopier`."""
        scatter(srcs, layout, kv, group, slots)


class DeviceCopier:
    """Engine memory of an accelerator: in stream order, through `lmcache_kernels.pipeline`.

    Where kernels turn out not to run, `gather` and `scatter` do the work by tensor operations, and wait for it.

    Args:
        device: where the engine's memory lies.
        pipeline: of that device.
    """

    def __init__(self, device: torch.device, pipeline: Pipeline) -> None:
        self._device = device
        self._pipeline = pipeline
        self._plain = HostCopier()

    def now(self) -> object:
        """See `EngineCopier`."""
        return self._pipeline.now()

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> Completion | None:
        """See `EngineCopier`."""
        self._here()
        if not served_by_torch(self._device):
            copies = self._copies(kv, group, slots, len(outs), layout, missing=False)
            try:
                arrival = self._pipeline.store(copies, shape_of(layout), outs)
            except torch.OutOfMemoryError as error:
                self._pipeline.drain()
                raise StagingFullError("no device memory for staging") from error
            except Exception as error:
                self._give_up(error)
            else:
                if arrival is None:
                    raise StagingFullError("copies to the host are too far behind")
                return self._arrival(arrival)
        self._plain.store(kv, group, slots, outs, layout)
        return None

    def load(
        self,
        srcs: Sequence[torch.Tensor],
        layout: ObjectLayout,
        kv: BoundKV,
        group: int,
        slots: torch.Tensor,
        after: object = None,
    ) -> Completion | None:
        """See `EngineCopier`."""
        self._here()
        if not served_by_torch(self._device):
            copies = self._copies(kv, group, slots, len(srcs), layout, missing=True)
            try:
                arrival = self._pipeline.load(
                    copies,
                    shape_of(layout),
                    srcs,
                    pages=kv.groups[group].storages,
                    after=after,
                    direct=srcs[0].is_pinned(),
                )
            except torch.OutOfMemoryError:
                self._pipeline.drain()
                raise
            except Exception as error:
                self._give_up(error)
            else:
                return self._arrival(arrival)
        if after is not None:
            self._pipeline.wait_for(after)
        self._plain.load(srcs, layout, kv, group, slots)
        self._pipeline.wait_for(self._pipeline.now())  # tensor operations only enqueue
        return None

    def _give_up(self, error: Exception) -> None:
        """Kernels do not run here. What was enqueued before that was found out must not come later than what replaces it."""
        give_up(self._device, error)
        self._pipeline.drain()

    def _arrival(self, arrival: arrivals.Completion) -> Completion:
        def wait() -> None:
            self._here()
            arrival.wait()

        return wait

    def _here(self) -> None:
        """Threads of the cache begin on device 0, and would open a context of half a GiB there by touching an event."""
        if self._device.index is not None and threading.current_thread().name.startswith("lmcache-"):
            torch.accelerator.set_device_index(self._device.index)

    def _copies(
        self, kv: BoundKV, group: int, slots: torch.Tensor, objects: int, layout: ObjectLayout, *, missing: bool
    ) -> list[RowCopy]:
        """Checked; object i begins at address `i × layout.nbytes`."""
        bound = kv.groups[group]
        ids = check_slots(slots, bound.num_slots, objects * layout.tokens, missing=missing, unique=missing)
        return row_copies(bound, layout, ids, [i * layout.nbytes for i in range(objects)])


def shape_of(layout: ObjectLayout) -> ObjectShape:
    """How an object's bytes fall into layers."""
    first = [segment for segment in layout.segments() if segment.layer == 0]
    return ObjectShape(layout.nbytes, layout.layers, tuple((s.offset, s.nbytes) for s in first))


def copy_engine(copies: Dma, device: torch.device) -> CopyEngine:
    """`copies` between `device` and the host, as a pipeline calls for them."""

    def engine(
        dst: Ints,
        src: Ints,
        nbytes: Ints,
        *,
        into: Sequence[torch.Tensor],
        out_of: Sequence[torch.Tensor],
        stream: object,
    ) -> None:
        host = into if out_of[0].device == device else out_of
        pinned = host[0].is_pinned()
        copies.copy(dst, src, nbytes, into=Memory(into), out_of=Memory(out_of), stream=stream, pinned=pinned)

    return engine


def open_copier(
    device: torch.device, *, staging_bytes: int = 256 << 20, copy_engine_bytes: int = DMA_BYTES
) -> EngineCopier:
    """What moves bytes in and out of this device's memory.

    Args:
        device: where the engine's memory lies.
        staging_bytes, copy_engine_bytes: see `lmcache.Config`.
    """
    if device.type == "cpu":
        return HostCopier()

    def say(line: str) -> None:
        info("copy-engine", detail=line)

    copies = Dma(find_driver(device, say), say=say)

    pipeline = Pipeline(
        TorchStreams(device),
        device,
        copy_one,
        copy_engine(copies, device),
        staging=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device),
        staging_bytes=staging_bytes,
        # The limit is that of batched copies; one by one, every piece costs a call.
        dma_bytes=copy_engine_bytes if copies.driver is not None else max(copy_engine_bytes, _ALONE_BYTES),
    )
    return DeviceCopier(device, pipeline)
