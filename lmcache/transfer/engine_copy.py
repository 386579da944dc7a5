"""Copies objects between engine memory and host buffers: synchronously on the host, in stream order on a device."""

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
from lmcache_kernels.dispatch import copy_one, give_up, served_by_torch
from lmcache_kernels.dma import Dma, Memory, find_driver
from lmcache_kernels.pipeline import Completion as PipelineCompletion
from lmcache_kernels.pipeline import CopyEngine, ObjectShape, Pipeline
from lmcache_kernels.rowcopy import Ints
from lmcache_kernels.streams import TorchStreams

Completion = Callable[[], None]
"""Blocks until all bytes have been copied. Called once, on a thread that may block; raises the copy's error."""

_MIN_SINGLE_COPY_BYTES = 1 << 20
"""Minimum bytes of a copy by the copy engine where it copies pieces one by one, each by a call of its own."""


class StagingFullError(Exception):
    """No staging memory is available for a store at the moment; nothing was copied."""


class EngineCopier(Protocol):
    """Copies objects between engine memory and host buffers. No call waits for a device."""

    def now(self) -> object:
        """Returns the current point of the engine's stream, for `load(after=…)`."""
        ...

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> Completion | None:
        """Copies objects out of engine memory. Afterwards work enqueued on the engine's stream may overwrite the source.

        Args:
            kv: the engine's memory.
            group: index of the layer group.
            slots: int64 `(objects × layout.tokens,)`, object after object; all resident.
            outs: one uint8 `(layout.nbytes,)` tensor per object.
            layout: layout of the objects.

        Returns:
            None if all bytes have been copied; otherwise `outs` must not be read before completion.

        Raises:
            StagingFullError: nothing was copied.
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
        """Copies objects into engine memory, skipping tokens whose slot is −1.

        Args:
            srcs, layout, kv, group, slots: as for `store`; slots are distinct, or −1.
            after: point of the engine's stream after which the pages are free; default: now.

        Returns:
            None if all bytes have been copied; otherwise `srcs` must not change before completion.
        """
        ...


class HostCopier:
    """Copies engine memory that the host can access, with `gather` and `scatter`; complete on return."""

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
    """Copies engine memory of an accelerator in stream order, through `lmcache_kernels.pipeline`.

    If kernels do not run on the device, `gather` and `scatter` copy with tensor operations, and block.

    Args:
        device: the engine's device.
        pipeline: the device's pipeline.
    """

    def __init__(self, device: torch.device, pipeline: Pipeline) -> None:
        self._device = device
        self._pipeline = pipeline
        self._fallback = HostCopier()

    def now(self) -> object:
        """See `EngineCopier`."""
        return self._pipeline.now()

    def store(
        self, kv: BoundKV, group: int, slots: torch.Tensor, outs: Sequence[torch.Tensor], layout: ObjectLayout
    ) -> Completion | None:
        """See `EngineCopier`."""
        self._use_device()
        if not served_by_torch(self._device):
            copies = self._copies(kv, group, slots, len(outs), layout, missing=False)
            try:
                completion = self._pipeline.store(copies, shape_of(layout), outs)
            except torch.OutOfMemoryError as error:
                self._pipeline.drain()
                raise StagingFullError("no device memory for staging") from error
            except Exception as error:
                self._give_up(error)
            else:
                if completion is None:
                    raise StagingFullError("copies to the host are too far behind")
                return self._completion(completion)
        self._fallback.store(kv, group, slots, outs, layout)
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
        self._use_device()
        if not served_by_torch(self._device):
            copies = self._copies(kv, group, slots, len(srcs), layout, missing=True)
            try:
                completion = self._pipeline.load(
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
                return self._completion(completion)
        if after is not None:
            self._pipeline.wait_for(after)
        self._fallback.load(srcs, layout, kv, group, slots)
        self._pipeline.wait_for(self._pipeline.now())  # tensor operations only enqueue
        return None

    def _give_up(self, error: Exception) -> None:
        """Switches to tensor operations. Work that was enqueued before the error must end before its replacement begins."""
        give_up(self._device, error)
        self._pipeline.drain()

    def _completion(self, event: PipelineCompletion) -> Completion:
        def wait() -> None:
            self._use_device()
            event.wait()

        return wait

    def _use_device(self) -> None:
        """Selects the engine's device on the cache's threads, which would create a context of half a GiB on device 0."""
        if self._device.index is not None and threading.current_thread().name.startswith("lmcache-"):
            torch.accelerator.set_device_index(self._device.index)

    def _copies(
        self, kv: BoundKV, group: int, slots: torch.Tensor, objects: int, layout: ObjectLayout, *, missing: bool
    ) -> list[RowCopy]:
        """Checks the slots and returns the copies; object i starts at address `i × layout.nbytes`."""
        bound = kv.groups[group]
        ids = check_slots(slots, bound.num_slots, objects * layout.tokens, missing=missing, unique=missing)
        return row_copies(bound, layout, ids, [i * layout.nbytes for i in range(objects)])


def shape_of(layout: ObjectLayout) -> ObjectShape:
    """Returns the division of an object's bytes into layers."""
    first = [segment for segment in layout.segments() if segment.layer == 0]
    return ObjectShape(layout.nbytes, layout.layers, tuple((s.offset, s.nbytes) for s in first))


def copy_engine(copies: Dma, device: torch.device) -> CopyEngine:
    """Returns `copies` as a pipeline's copy engine, between `device` and the host."""

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
    """Opens the copier for a device's memory.

    Args:
        device: the engine's device.
        staging_bytes, copy_engine_bytes: see `lmcache.Config`.
    """
    if device.type == "cpu":
        return HostCopier()

    def log(line: str) -> None:
        info("copy-engine", detail=line)

    copies = Dma(find_driver(device, log), say=log)
    pipeline = Pipeline(
        TorchStreams(device),
        device,
        copy_one,
        copy_engine(copies, device),
        staging=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device),
        staging_bytes=staging_bytes,
        # `copy_engine_bytes` assumes batched copies.
        dma_bytes=copy_engine_bytes if copies.driver is not None else max(copy_engine_bytes, _MIN_SINGLE_COPY_BYTES),
    )
    return DeviceCopier(device, pipeline)
