"""Objects between a device's pages and host memory, in stream order, through a bounded ring of staging memory.

A store gathers on the engine's own stream, at the speed of device memory, and copies out on a stream of its own: when the call
returns, work that the engine enqueues later may overwrite the pages. Only where more is stored at once than the ring holds
does the engine's stream wait for the link, and where the link is too far behind, a store is refused.

A load begins when the engine's stream has let go of the pages, and tells by an event for each layer when it is there, so that
layer *i + 1* arrives while layer *i* computes. Pieces that are long on both sides go straight to the pages by the copy engine;
the rest is read by the kernel out of pinned memory, or passes through the ring where memory is not pinned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch

from lmcache_kernels.planner import DMA_BYTES, plan, ranges, union
from lmcache_kernels.rowcopy import Ints, RowCopy
from lmcache_kernels.streams import Span, Streams, Touches

Kernel = Callable[..., None]
"""`kernel(copy, into_a=…, device=…, max_programs=…)`, on the current stream; see `lmcache_kernels.triton_copy.copy_rows`."""


class CopyEngine(Protocol):
    """Copies by descriptors on the current stream; see `lmcache_kernels.dma.Dma`."""

    def __call__(
        self,
        dst: Ints,
        src: Ints,
        nbytes: Ints,
        *,
        into: Sequence[torch.Tensor],
        out_of: Sequence[torch.Tensor],
        stream: Any,
    ) -> None:
        """Enqueue copies between absolute addresses, which lie in these tensors' storages."""
        ...


@dataclass(frozen=True)
class ObjectShape:
    """How an object's bytes fall into layers: `regions` are (offset, bytes per layer), each with all `layers` in order."""

    nbytes: int
    layers: int
    regions: tuple[Span, ...]


@dataclass(frozen=True)
class Piece:
    """Layers [start, stop) of one region of some objects: as many contiguous runs as there are objects."""

    objects: range
    offset: int
    layer_bytes: int
    layers: range

    @property
    def span(self) -> Span:
        """(offset in the object, bytes)."""
        return self.offset + self.layers.start * self.layer_bytes, len(self.layers) * self.layer_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all objects together."""
        return len(self.objects) * self.span[1]


def pieces(shape: ObjectShape, objects: int, most: int, layers: range) -> Iterator[Piece]:
    """The objects in pieces of at most `most` bytes, or one layer of one object; layer by layer, then object by object."""
    at_once = max(1, most // (objects * max(size for _, size in shape.regions)))
    for start in range(layers.start, layers.stop, at_once):
        some = range(start, min(start + at_once, layers.stop))
        for offset, layer_bytes in shape.regions:  # a layer is there when it is there in all of them
            step = max(1, most // (len(some) * layer_bytes))
            for first in range(0, objects, step):
                yield Piece(range(first, min(first + step, objects)), offset, layer_bytes, some)


def of_piece(copies: Sequence[RowCopy], shape: ObjectShape, piece: Piece, starts: Ints) -> list[RowCopy]:
    """The part of `copies` that concerns a piece, with the piece of object `piece.objects[i]` beginning at `starts[i]`.

    In `copies`, object i begins at address `i × shape.nbytes`.
    """
    low, nbytes = piece.span
    out = []
    for copy in copies:
        layers = np.flatnonzero((copy.b_layers >= low) & (copy.b_layers < low + nbytes))
        number = copy.b_base // shape.nbytes
        objects = np.flatnonzero((number >= piece.objects.start) & (number < piece.objects.stop))
        if len(layers) and len(objects):
            out.append(
                replace(
                    copy,
                    a_base=copy.a_base[layers],
                    a_units=copy.a_units[objects],
                    b_base=starts[number[objects] - piece.objects.start],
                    b_layers=copy.b_layers[layers] - low,
                )
            )
    return out


class Completion:
    """When everything of one call is there."""

    def __init__(self, streams: Streams, event: Any, layers: dict[int, Any]) -> None:
        self._streams = streams
        self._event = event
        self._layers = layers

    def done(self) -> bool:
        """Whether all bytes are there."""
        return self._streams.done(self._event)

    def wait(self) -> None:
        """Let this thread wait for all bytes."""
        self._streams.synchronise(self._event)

    def wait_layer(self, layer: int) -> None:
        """The engine's stream waits for one layer of a load; this thread does not."""
        self._streams.wait(self._streams.compute(), self._layers[layer])


_ALIGN = 256  # of each part of a ring


class _Ring:
    """Staging memory in equal parts, taken in turns. `free[i]`: the event after which part i may be written again."""

    def __init__(self, memory: torch.Tensor, parts: int) -> None:
        self.part_bytes = memory.numel() // parts // _ALIGN * _ALIGN
        self.memory = memory
        self.free: list[Any] = [None] * parts
        self._next = 0

    def take(self) -> tuple[int, int]:
        """(part, its address)."""
        part = self._next
        self._next = (part + 1) % len(self.free)
        return part, self.memory.data_ptr() + part * self.part_bytes


PARTS = 4
"""Of each ring: while one part is copied out, the next is gathered, and a slow one does not stop both."""


class Pipeline:
    """Stores and loads of one device. One store and one load at a time are enqueued; any number are under way.

    Args:
        streams: of the device.
        device: where pages and staging memory lie.
        kernel, engine: what moves rows, and what moves long pieces.
        staging: bytes → uint8 tensor on the device; called once for each ring, when first needed.
        staging_bytes: of both rings together.
        backlog_bytes: stores that wait for the link at most; beyond, they are refused.
        dma_bytes: see `planner.plan`.
        load_programs: most programs of a kernel that reads host memory: enough to fill a link, few enough for the engine.
    """

    def __init__(
        self,
        streams: Streams,
        device: torch.device,
        kernel: Kernel,
        engine: CopyEngine,
        *,
        staging: Callable[[int], torch.Tensor],
        staging_bytes: int,
        backlog_bytes: int = 1 << 30,
        dma_bytes: int = DMA_BYTES,
        load_programs: int = 64,
    ) -> None:
        self._streams = streams
        self._device = device
        self._kernel = kernel
        self._engine = engine
        self._staging = staging
        self._ring_bytes = staging_bytes // 2
        self._backlog_bytes = backlog_bytes
        self._dma_bytes = dma_bytes
        self._load_programs = load_programs
        self._store_lock, self._load_lock = Lock(), Lock()
        self._rings: dict[str, _Ring] = {}
        self._outgrown: list[_Ring] = []  # kept: copies through them may be under way
        # What may not be over: (event, bytes that wait for the link, memory that has to live until then).
        self._stores: deque[tuple[Any, int, object]] = deque()
        self._loads: deque[tuple[Any, int, object]] = deque()

    def now(self) -> Any:
        """An event at this point of the engine's stream, for `load(after=…)`."""
        return self._streams.record(self._streams.compute())

    def wait_for(self, event: Any) -> None:
        """Let this thread wait for an event."""
        self._streams.synchronise(event)

    def drain(self) -> None:
        """Wait for all that was ever enqueued, by calls that failed half-way too."""
        for name in ("store", "bring", "load"):
            self.wait_for(self._streams.record(self._streams.side(name)))

    # ---------------------------------------------------------------- pages → host

    def store(self, copies: Sequence[RowCopy], shape: ObjectShape, outs: Sequence[torch.Tensor]) -> Completion | None:
        """Copy objects out of pages.

        Args:
            copies: what to gather; object i begins at address `i × shape.nbytes`.
            shape: of the objects.
            outs: uint8 `(shape.nbytes,)` host tensors; not to be touched before the arrival.

        Returns:
            The arrival, or None if the link is too far behind: then nothing was enqueued.
        """
        with self._store_lock:
            total = shape.nbytes * len(outs)
            self._let_go(self._stores)
            if self._stores and sum(nbytes for _, nbytes, _ in self._stores) + total > self._backlog_bytes:
                return None
            compute, side = self._streams.compute(), self._streams.side("store")
            ring = self._ring("store", shape)
            for piece in pieces(shape, len(outs), ring.part_bytes, range(shape.layers)):
                part, address = ring.take()
                if ring.free[part] is not None:
                    self._streams.wait(compute, ring.free[part])
                self._gather(compute, copies, shape, piece, address)
                self._streams.wait(side, self._streams.record(compute))
                self._copy_out(side, piece, ring.memory, address, outs)
                ring.free[part] = self._streams.record(side)
            event = self._streams.record(side)
            self._stores.append((event, total, outs))
            return Completion(self._streams, event, {})

    def _let_go(self, under_way: deque[tuple[Any, int, object]]) -> None:
        while under_way and self._streams.done(under_way[0][0]):
            under_way.popleft()

    def _gather(self, stream: Any, copies: Sequence[RowCopy], shape: ObjectShape, piece: Piece, address: int) -> None:
        starts = address + np.arange(len(piece.objects), dtype=np.int64) * piece.span[1]
        rows = of_piece(copies, shape, piece, starts)
        self._rows(stream, rows, into_a=False)

    def _copy_out(
        self, stream: Any, piece: Piece, ring: torch.Tensor, address: int, outs: Sequence[torch.Tensor]
    ) -> None:
        low, nbytes = piece.span
        src = address + np.arange(len(piece.objects), dtype=np.int64) * nbytes
        dst = np.array([outs[i].data_ptr() + low for i in piece.objects], dtype=np.int64)
        self._descriptors(stream, dst, src, np.full(len(src), nbytes, dtype=np.int64), outs, [ring])

    # ---------------------------------------------------------------- host → pages

    def load(
        self,
        copies: Sequence[RowCopy],
        shape: ObjectShape,
        srcs: Sequence[torch.Tensor],
        *,
        pages: Sequence[torch.Tensor],
        after: Any = None,
        layers: range | None = None,
        by_layer: bool = False,
        direct: bool = False,
    ) -> Completion:
        """Copy objects into pages.

        Args:
            copies, shape: as for `store`.
            srcs: uint8 `(shape.nbytes,)` host tensors; they must stay as they are until the arrival.
            pages: tensors whose storages hold the pages.
            after: an event from `now`, after which the pages are free; default: now.
            layers: only these.
            by_layer: one event for each layer, in order.
            direct: the device can read `srcs` (pinned memory): nothing passes through staging memory.
        """
        after = self.now() if after is None else after
        wanted = range(shape.layers) if layers is None else layers
        with self._load_lock:
            self._let_go(self._loads)
            bring, scatter = self._streams.side("bring"), self._streams.side("load")
            self._streams.wait(scatter, after)
            if direct:  # else it fills staging memory, which the engine does not know
                self._streams.wait(bring, after)
            events: dict[int, Any] = {}
            for some in [range(i, i + 1) for i in wanted] if by_layer else [wanted]:
                if direct:
                    self._straight(bring, scatter, copies, shape, srcs, pages, some)
                else:
                    self._through_staging(bring, scatter, copies, shape, srcs, some)
                event = self._streams.record(scatter)
                events |= dict.fromkeys(some, event)
            event = self._streams.record(scatter)
            self._loads.append((event, 0, srcs))
            return Completion(self._streams, event, events)

    def _straight(
        self,
        bring: Any,
        scatter: Any,
        copies: Sequence[RowCopy],
        shape: ObjectShape,
        srcs: Sequence[torch.Tensor],
        pages: Sequence[torch.Tensor],
        layers: range,
    ) -> None:
        """Long pieces by the copy engine, short ones by a kernel that reads host memory; both at once."""
        a: list[Ints] = []
        b: list[Ints] = []
        nbytes: list[Ints] = []
        rest: list[RowCopy] = []
        for offset, layer_bytes in shape.regions:
            piece = Piece(range(len(srcs)), offset, layer_bytes, layers)
            starts = np.array([src.data_ptr() + piece.span[0] for src in srcs], dtype=np.int64)
            for rows in of_piece(copies, shape, piece, starts):
                divided = plan(rows, dma_bytes=self._dma_bytes)
                a.append(divided.a)
                b.append(divided.b)
                nbytes.append(divided.nbytes)
                rest += divided.kernel
        if sum(map(len, a)):
            self._descriptors(bring, np.concatenate(a), np.concatenate(b), np.concatenate(nbytes), pages, srcs)
        self._rows(scatter, rest, into_a=True, programs=self._load_programs)
        self._streams.wait(scatter, self._streams.record(bring))

    def _through_staging(
        self,
        bring: Any,
        scatter: Any,
        copies: Sequence[RowCopy],
        shape: ObjectShape,
        srcs: Sequence[torch.Tensor],
        layers: range,
    ) -> None:
        ring = self._ring("load", shape)
        for piece in pieces(shape, len(srcs), ring.part_bytes, layers):
            part, address = ring.take()
            if ring.free[part] is not None:
                self._streams.wait(bring, ring.free[part])
            low, nbytes = piece.span
            starts = address + np.arange(len(piece.objects), dtype=np.int64) * nbytes
            sources = np.array([srcs[i].data_ptr() + low for i in piece.objects], dtype=np.int64)
            self._descriptors(bring, starts, sources, np.full(len(starts), nbytes, dtype=np.int64), [ring.memory], srcs)
            self._streams.wait(scatter, self._streams.record(bring))
            self._rows(scatter, of_piece(copies, shape, piece, starts), into_a=True)
            ring.free[part] = self._streams.record(scatter)

    # ---------------------------------------------------------------- launches

    def _rows(self, stream: Any, rows: Sequence[RowCopy], *, into_a: bool, programs: int | None = None) -> None:
        def work() -> None:
            for copy in rows:
                self._kernel(copy, into_a=into_a, device=self._device, max_programs=programs)

        def touches() -> Touches:
            pages, objects = (
                [span for copy in rows for span in zip(*(x.tolist() for x in ranges(copy, side)), strict=True)]
                for side in ("a", "b")
            )
            return Touches(objects, pages) if into_a else Touches(pages, objects)

        if rows:
            self._streams.launch(stream, work, touches)

    def _descriptors(
        self,
        stream: Any,
        dst: Ints,
        src: Ints,
        nbytes: Ints,
        into: Sequence[torch.Tensor],
        out_of: Sequence[torch.Tensor],
    ) -> None:
        def touches() -> Touches:
            reads, writes = (list(zip(*(x.tolist() for x in union(side, nbytes)), strict=True)) for side in (src, dst))
            return Touches(reads, writes)

        def work() -> None:
            self._engine(dst, src, nbytes, into=into, out_of=out_of, stream=stream)

        self._streams.launch(stream, work, touches)

    def _ring(self, name: str, shape: ObjectShape) -> _Ring:
        """The ring, large enough for one layer of one object in each part."""
        least = max(-(-layer_bytes // _ALIGN) * _ALIGN for _, layer_bytes in shape.regions)
        found = self._rings.get(name)
        if found is None or found.part_bytes < least:
            self._outgrown += [] if found is None else [found]
            memory = self._staging(max(self._ring_bytes, PARTS * least))
            found = self._rings[name] = _Ring(memory, PARTS)
        return found
