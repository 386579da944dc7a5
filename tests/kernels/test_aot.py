"""Ahead-of-time compilation without a GPU: wide accesses, no spills, and detection of narrow accesses."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from lmcache_kernels import aot
from lmcache_kernels.cases import CASES
from lmcache_kernels.launch import specialise
from lmcache_kernels.quantise import FLOATS, LARGEST


@pytest.fixture(scope="module")
def reports() -> list[aot.KernelReport]:
    return list(aot.report())


def test_every_kernel_for_every_gpu_is_wide_and_spills_nothing(reports: list[aot.KernelReport]) -> None:
    assert len(reports) == (2 * len(CASES) + 2 * len(FLOATS) * len(LARGEST)) * len(aot.TARGETS)
    assert aot.verdicts(reports) == []


def test_only_odd_rows_are_excused_from_sixteen_bytes(reports: list[aot.KernelReport]) -> None:
    excused = {case.name for case in CASES if case.why}
    assert excused == {case.name for case in CASES if (case.wide, case.narrow) != (16, 16)}
    assert all(found.access_bytes == 16 for found in reports if found.kernel.rpartition(", ")[0] not in excused)


def test_tiles_are_turned_in_shared_memory_and_runs_need_none(reports: list[aot.KernelReport]) -> None:
    odd = {case.name for case in CASES if case.why}
    for found in (found for found in reports if found.kernel.rpartition(", ")[0] not in odd):
        if found.kind == "run":
            assert found.shared_bytes == 0
        elif found.kind == "turn" and found.target != "gfx942":
            assert found.shared_bytes > 0
        assert found.occupancy >= (0.25 if found.kind == "convert" else 0.5)
        assert found.in_flight_bytes >= found.access_bytes


@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_kernel_that_knows_nothing_of_alignment_is_a_verdict(target: str) -> None:
    case = CASES[0]
    found = aot.compiled(f"{case.name}, out", aot.narrowed(specialise(case.copy())), target, into_a=False)
    assert found.access_bytes < 16
    [verdict] = aot.verdicts([found])
    assert verdict.startswith(f"pages as they are, out, {target}: loads of ")


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="'sm_12' is not one of sm_80"):
        next(aot.report(["sm_12"]))
