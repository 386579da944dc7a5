"""Compares the kernels with the device's own copies, in one unattended run on a GPU.

Every kind of copy moves bytes between pages in random order and objects, within device memory and, if memory can be pinned,
directly to and from the host. The reference is one plain copy of the same number of bytes over the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lmcache_kernels import RowCopy
from lmcache_kernels.cases import CASES, Case

Kernel = Callable[..., None]
Clock = Callable[[Callable[[], object]], float]
"""Measures the seconds that a call takes on the device, including all work it enqueues."""

USUAL = tuple(case for case in CASES if not case.why)
"""All cases except those with odd rows."""


@dataclass(frozen=True)
class GpuResult:
    """Speed of one copy.

    Attributes:
        kernel: kind of copy, see `lmcache_kernels.cases`.
        direction: "store" (pages → objects) or "load".
        road: "device" (objects in device memory) or "host" (in pinned host memory, reached by the kernel itself).
        programs: limit on concurrent programs; None: no limit.
        nbytes: bytes moved.
        gbs: GB/s.
        limit_gbs: GB/s of one plain copy over the same path.
        ratio: gbs / limit_gbs.
        correct: whether the copied bytes are right.
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
    """Measures every case in both directions over each path, for each limit on programs.

    Args:
        device: device of the pages.
        kernel: a function like `lmcache_kernels.triton_copy.copy_rows`.
        cases: what to copy; default `USUAL`.
        nbytes: approximate bytes per copy.
        repeat: number of repetitions; the best one counts.
        programs: see `GpuResult`.
        pin: also measure the path to pinned host memory.
        clock: how to time a call; default: device events.
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
                        correct=_round_trip_is_exact(copy, pages, objects, kernel),
                    )


def _shuffled(copy: RowCopy) -> RowCopy:
    """Returns `copy` with its pages in random order, as in a block table."""
    flat = copy.a_units.reshape(-1)
    order = np.random.default_rng(0).permutation(flat.size)
    return replace(copy, a_units=flat[order].reshape(copy.a_units.shape))


def _limits(pages: torch.Tensor, objects: torch.Tensor, nbytes: int, repeat: int, clock: Clock) -> tuple[float, float]:
    """Returns the seconds of one plain copy of the same number of bytes: pages → objects, and back."""
    nbytes = min(nbytes, pages.numel(), objects.numel())
    here, there = pages[:nbytes], objects[:nbytes]
    if pages.device == objects.device:
        there = torch.empty_like(here)  # within one memory: never copy a range onto itself
    return (
        _best(repeat, lambda: there.copy_(here, non_blocking=True), clock),
        _best(repeat, lambda: here.copy_(there, non_blocking=True), clock),
    )


def _round_trip_is_exact(copy: RowCopy, pages: torch.Tensor, objects: torch.Tensor, kernel: Kernel) -> bool:
    """Returns whether random runs of random rows are equal on both sides after a store, and after a load into empty pages."""
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
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # about 10 ms, so that the host is ahead of the device
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return clock


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
