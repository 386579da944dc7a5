"""Moves objects between a device's pages and host memory, in stream order, through a bounded ring of staging memory.

A store gathers on the engine's own stream, at device memory bandwidth, and copies to the host on a separate stream: when the
call returns, work that the engine enqueues later may overwrite the pages. The engine's stream waits for the host link only if
one call stores more than the ring holds; if too many bytes are waiting for the link, the store is refused.

A load starts once the engine's stream has finished using the pages. From pinned memory, the copy engine writes pieces that are
long on both sides directly into the pages, and the kernel reads the rest; from pageable memory, everything passes through the
ring.
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
    """Runs copy descriptors on the current stream; see `lmcache_kernels.dma.Dma`."""

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
        """Enqueues copies between absolute addresses, which must lie in the storages of `into` and `out_of`."""
        ...


@dataclass(frozen=True)
class ObjectShape:
    """Division of an object's bytes into layers: `regions` are (offset, bytes per layer), each holding all `layers` in order."""

    nbytes: int
    layers: int
    regions: tuple[Span, ...]


@dataclass(frozen=True)
class Piece:
    """Layers [start, stop) of one region of some objects: one contiguous run per object."""

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
        """Bytes in total, over all objects."""
        return len(self.objects) * self.span[1]


def pieces(shape: ObjectShape, objects: int, most: int) -> Iterator[Piece]:
    """Cuts objects into pieces of at most `most` bytes (but at least one layer of one object), ordered by layer, then object."""
    at_once = max(1, most // (objects * max(size for _, size in shape.regions)))
    for start in range(0, shape.layers, at_once):
        some = range(start, min(start + at_once, shape.layers))
        for offset, layer_bytes in shape.regions:
            step = max(1, most // (len(some) * layer_bytes))
            for first in range(0, objects, step):
                yield Piece(range(first, min(first + step, objects)), offset, layer_bytes, some)


def of_piece(copies: Sequence[RowCopy], shape: ObjectShape, piece: Piece, starts: Ints) -> list[RowCopy]:
    """Restricts `copies` to one piece, with the piece of object `piece.objects[i]` at address `starts[i]`.

    In `copies`, object i starts at address `i × shape.nbytes`.
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
    """Completion of one store or load."""

    def __init__(self, streams: Streams, event: Any) -> None:
        self._streams = streams
        self._event = event

    def done(self) -> bool:
        """Whether all bytes have been copied."""
        return self._streams.done(self._event)

    def wait(self) -> None:
        """Blocks this thread until all bytes have been copied."""
        self._streams.synchronise(self._event)


_ALIGN = 256  # bytes, of each part of a ring


class _Ring:
    """Staging memory in equal parts, used round-robin. `free[i]`: the event after which part i may be overwritten."""

    def __init__(self, memory: torch.Tensor, parts: int) -> None:
        self.part_bytes = memory.numel() // parts // _ALIGN * _ALIGN
        self.memory = memory
        self.free: list[Any] = [None] * parts
        self._next = 0

    def take(self) -> tuple[int, int]:
        """Returns the next part's index and address."""
        part = self._next
        self._next = (part + 1) % len(self.free)
        return part, self.memory.data_ptr() + part * self.part_bytes


PARTS = 4
"""Parts per ring: gathering into one part overlaps with copying out of others."""


class Pipeline:
    """Stores and loads of one device. Thread-safe; enqueues one store and one load at a time, any number may be in flight.

    Args:
        streams: the device's streams.
        device: the device that holds pages and staging memory.
        kernel, engine: copy rows and long contiguous pieces, respectively.
        staging: bytes → uint8 tensor on the device; called when a ring is first needed, and when it must grow.
        staging_bytes: total size of both rings.
        backlog_bytes: maximum bytes of stores waiting for the link; further stores are refused.
        dma_bytes: see `planner.plan`.
        load_programs: maximum programs of a kernel that reads host memory: enough to saturate the link, few enough to leave
            compute to the engine.
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
        self._outgrown: list[_Ring] = []  # kept alive: copies through them may be in flight
        # In flight: (event, bytes waiting for the link, memory to keep alive until the event).
        self._stores: deque[tuple[Any, int, object]] = deque()
        self._loads: deque[tuple[Any, int, object]] = deque()

    def now(self) -> Any:
        """Records an event at the current point of the engine's stream, for `load(after=…)`."""
        return self._streams.record(self._streams.compute())

    def wait_for(self, event: Any) -> None:
        """Blocks this thread until an event."""
        self._streams.synchronise(event)

    def drain(self) -> None:
        """Blocks until everything enqueued so far is done, including the work of calls that failed half-way."""
        for name in ("store", "h2d", "load"):
            self.wait_for(self._streams.record(self._streams.side(name)))

    # ---------------------------------------------------------------- pages → host

    def store(self, copies: Sequence[RowCopy], shape: ObjectShape, outs: Sequence[torch.Tensor]) -> Completion | None:
        """Copies objects out of pages.

        Args:
            copies: what to gather; object i starts at address `i × shape.nbytes`.
            shape: the objects' division into layers.
            outs: uint8 `(shape.nbytes,)` host tensors; must not be accessed before completion.

        Returns:
            The completion, or None if the backlog is full: nothing was enqueued.
        """
        with self._store_lock:
            total = shape.nbytes * len(outs)
            self._release_done(self._stores)
            if self._stores and sum(nbytes for _, nbytes, _ in self._stores) + total > self._backlog_bytes:
                return None
            compute, side = self._streams.compute(), self._streams.side("store")
            ring = self._ring("store", shape)
            for piece in pieces(shape, len(outs), ring.part_bytes):
                part, address = ring.take()
                if ring.free[part] is not None:
                    self._streams.wait(compute, ring.free[part])
                self._gather(compute, copies, shape, piece, address)
                self._streams.wait(side, self._streams.record(compute))
                self._copy_out(side, piece, ring.memory, address, outs)
                ring.free[part] = self._streams.record(side)
            event = self._streams.record(side)
            self._stores.append((event, total, outs))
            return Completion(self._streams, event)

    def _release_done(self, in_flight: deque[tuple[Any, int, object]]) -> None:
        while in_flight and self._streams.done(in_flight[0][0]):
            in_flight.popleft()

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
        direct: bool = False,
    ) -> Completion:
        """Copies objects into pages.

        Args:
            copies, shape: as for `store`.
            srcs: uint8 `(shape.nbytes,)` host tensors; must not change before completion.
            pages: tensors whose storages hold the pages.
            after: an event from `now`, after which the pages may be overwritten; default: now.
            direct: the device can read `srcs` (pinned memory), so that staging memory is not needed.
        """
        after = self.now() if after is None else after
        with self._load_lock:
            self._release_done(self._loads)
            h2d, scatter = self._streams.side("h2d"), self._streams.side("load")
            self._streams.wait(scatter, after)
            if direct:  # otherwise `h2d` only writes staging memory, which the engine never accesses
                self._streams.wait(h2d, after)
                self._load_direct(h2d, scatter, copies, shape, srcs, pages)
            else:
                self._load_staged(h2d, scatter, copies, shape, srcs)
            event = self._streams.record(scatter)
            self._loads.append((event, 0, srcs))
            return Completion(self._streams, event)

    def _load_direct(
        self,
        h2d: Any,
        scatter: Any,
        copies: Sequence[RowCopy],
        shape: ObjectShape,
        srcs: Sequence[torch.Tensor],
        pages: Sequence[torch.Tensor],
    ) -> None:
        """Copies long pieces with the copy engine and short ones with a kernel that reads host memory, concurrently."""
        a: list[Ints] = []
        b: list[Ints] = []
        nbytes: list[Ints] = []
        rest: list[RowCopy] = []
        for offset, layer_bytes in shape.regions:
            piece = Piece(range(len(srcs)), offset, layer_bytes, range(shape.layers))
            starts = np.array([src.data_ptr() + piece.span[0] for src in srcs], dtype=np.int64)
            for rows in of_piece(copies, shape, piece, starts):
                divided = plan(rows, dma_bytes=self._dma_bytes)
                a.append(divided.a)
                b.append(divided.b)
                nbytes.append(divided.nbytes)
                rest += divided.kernel
        if sum(map(len, a)):
            self._descriptors(h2d, np.concatenate(a), np.concatenate(b), np.concatenate(nbytes), pages, srcs)
        self._rows(scatter, rest, into_a=True, programs=self._load_programs)
        self._streams.wait(scatter, self._streams.record(h2d))

    def _load_staged(
        self,
        h2d: Any,
        scatter: Any,
        copies: Sequence[RowCopy],
        shape: ObjectShape,
        srcs: Sequence[torch.Tensor],
    ) -> None:
        """Copies pieces into the ring, then scatters them into the pages."""
        ring = self._ring("load", shape)
        for piece in pieces(shape, len(srcs), ring.part_bytes):
            part, address = ring.take()
            if ring.free[part] is not None:
                self._streams.wait(h2d, ring.free[part])
            low, nbytes = piece.span
            starts = address + np.arange(len(piece.objects), dtype=np.int64) * nbytes
            sources = np.array([srcs[i].data_ptr() + low for i in piece.objects], dtype=np.int64)
            self._descriptors(h2d, starts, sources, np.full(len(starts), nbytes, dtype=np.int64), [ring.memory], srcs)
            self._streams.wait(scatter, self._streams.record(h2d))
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
        """Returns the ring, each part of which holds at least one layer of one object."""
        least = max(-(-layer_bytes // _ALIGN) * _ALIGN for _, layer_bytes in shape.regions)
        found = self._rings.get(name)
        if found is None or found.part_bytes < least:
            self._outgrown += [] if found is None else [found]
            memory = self._staging(max(self._ring_bytes, PARTS * least))
            found = self._rings[name] = _Ring(memory, PARTS)
        return found
