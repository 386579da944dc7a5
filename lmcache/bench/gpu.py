"""How close the kernels come to the device's own copies: on a GPU, in one run, without anybody watching.

For every kind of copy the same bytes move between pages in random order and objects, within device memory and, where memory can
be pinned, straight to and from the host; beside each stands one plain copy of as many bytes over the same road.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lmcache_kernels import RowCopy
from lmcache_kernels.cases import CASES, Case

Kernel = Callable[..., None]
Clock = Callable[[Callable[[], object]], float]
"""Seconds that a call takes on the device, everything it enqueued included."""

USUAL = tuple(case for case in CASES if not case.why)
"""All copies but those of odd rows."""


@dataclass(frozen=True)
class GpuResult:
    """Speed of one copy.

    Attributes:
        kernel: kind of copy, see `lmcache_kernels.cases`.
        direction: "store" (pages → objects) or "load".
        road: "device" (objects in device memory) or "host" (in pinned host memory, reached by the kernel itself).
        programs: most programs at a time; None = as many as there is work.
        nbytes: bytes moved.
        gbs: GB/s.
        limit_gbs: GB/s of one plain copy over the same road.
        ratio: the one as part of the other.
        correct: the bytes that arrived are those that left.
    """

    kernel: str
    direction: str
    road: str
    programs: int | None
    nbytes: int
    gbs: float
    limit_gbs: float
    ratio: float
    correct: bool


def measure(
    device: torch.device,
    kernel: Kernel,
    *,
    cases: Sequence[Case] = USUAL,
    nbytes: int = 256 << 20,
    repeat: int = 20,
    programs: tuple[int | None, ...] = (None, 16, 64),
    pin: bool = True,
    clock: Clock | None = None,
) -> Iterator[GpuResult]:
    """Every case both ways over each road, with few programs and many.

    Args:
        device: where the pages lie.
        kernel: as `lmcache_kernels.triton_copy.copy_rows`.
        cases: what to copy; default `USUAL`.
        nbytes: bytes per copy, about.
        repeat: the best of so many counts.
        programs: see `GpuResult`.
        pin: measure the road to pinned host memory as well.
        clock: how to time; default by events of the device.
    """
    clock = clock or _by_events(device)
    roads = {"device": device} | ({"host": torch.device("cpu")} if pin else {})
    for case in cases:
        units = max(2, nbytes // 16 // 4 // case.row_bytes)
        pages = torch.empty(case.a_unit * units * 16 * 4, dtype=torch.uint8, device=device)
        for road, place in roads.items():
            host = place != device
            objects = torch.empty(
                case.b_unit * units * 16 * 4, dtype=torch.uint8, device=place, pin_memory=host and pin
            )
            copy = _shuffled(case.copy(layers=16, objects=4, units=units, a=pages.data_ptr(), b=objects.data_ptr()))
            limits = _limits(pages, objects, copy.nbytes, repeat, clock)
            for into_a in (False, True):
                for most in programs:

                    def move(into_a: bool = into_a, most: int | None = most, copy: RowCopy = copy) -> None:
                        kernel(copy, into_a=into_a, device=device, max_programs=most, trusted=True)

                    seconds = _best(repeat, move, clock)
                    limit = limits[into_a]
                    yield GpuResult(
                        kernel=case.name,
                        direction="load" if into_a else "store",
                        road=road,
                        programs=most,
                        nbytes=copy.nbytes,
                        gbs=copy.nbytes / seconds / 1e9,
                        limit_gbs=copy.nbytes / limit / 1e9,
                        ratio=limit / seconds,
                        correct=_goes_round(copy, pages, objects, kernel),
                    )


def _shuffled(copy: RowCopy) -> RowCopy:
    """With its pages in random order, as a block table has them."""
    flat = copy.a_units.reshape(-1)
    order = np.random.default_rng(0).permutation(flat.size)
    return replace(copy, a_units=flat[order].reshape(copy.a_units.shape))


def _limits(pages: torch.Tensor, objects: torch.Tensor, nbytes: int, repeat: int, clock: Clock) -> tuple[float, float]:
    """Seconds of one plain copy of as many bytes: pages → objects, and back."""
    nbytes = min(nbytes, pages.numel(), objects.numel())
    here, there = pages[:nbytes], objects[:nbytes]
    if pages.device == objects.device:
        there = torch.empty_like(here)  # pages and objects are one memory: not onto itself
    return (
        _best(repeat, lambda: there.copy_(here, non_blocking=True), clock),
        _best(repeat, lambda: here.copy_(there, non_blocking=True), clock),
    )


def _goes_round(copy: RowCopy, pages: torch.Tensor, objects: torch.Tensor, kernel: Kernel) -> bool:
    """Whether random runs of random rows are the same on both sides after a store, and after a load into empty pages."""
    pages.random_(0, 256)
    rng = np.random.default_rng(1)
    runs = list(copy.inside())
    a, b = copy.rows()
    places = [
        (int(a[row]) + at_a - pages.data_ptr(), int(b[row]) + at_b - objects.data_ptr(), nbytes)
        for row in rng.integers(len(a), size=64)
        for at_a, at_b, nbytes in [runs[rng.integers(len(runs))]]
    ]
    for into_a in (False, True):
        (pages if into_a else objects).zero_()
        kernel(copy, into_a=into_a, device=pages.device)
        _wait(pages.device)
        for here, there, nbytes in places:
            if not torch.equal(pages[here : here + nbytes].cpu(), objects[there : there + nbytes].cpu()):
                return False
    return bool(pages.any())


def _best(repeat: int, call: Callable[[], object], clock: Clock) -> float:
    call()
    return min(clock(call) for _ in range(repeat))


def _by_events(device: torch.device) -> Clock:
    def clock(call: Callable[[], object]) -> float:
        start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # some 10 ms, in which the host gets ahead of the device
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return clock


def by_the_wall(call: Callable[[], object]) -> float:
    """A clock for devices that finish when a call returns."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
