"""`lmcache bench kernels`, as far as it can be tested without a GPU."""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Callable

import pytest
import torch
from clilab import Run
from rowlab import copy_rows as move_rows

from lmcache.bench.gpu import measure
from lmcache_kernels.cases import CASES

SMALL = [case for case in CASES if case.name in ("tokens of a pool, 384 bytes", "AMX K, turned")]

pytest.importorskip("triton", reason="Triton is not installed")


def test_the_report_is_a_list_with_what_a_machine_compares(run: Run) -> None:
    done = run("bench", "kernels", "--aot", "--target", "sm_90", "--target", "gfx942", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {one["target"] for one in found} == {"sm_90", "gfx942"}
    for one in found:
        assert {"kernel", "target", "access_bytes", "registers", "spill_bytes"} <= one.keys()
        assert one["spill_bytes"] == 0
        assert one["registers"] > 0


def test_a_regression_is_told_and_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_kernels import aot

    monkeypatch.setattr(aot, "specialise", lambda copy: aot.narrowed(honest(copy)))
    from lmcache_kernels.launch import specialise as honest

    done = run("bench", "kernels", "--aot", "--target", "sm_80")
    assert done.exit_code == 1
    assert "pages as they are, out, sm_80: loads of 8 and stores of 8 bytes, must be 16 and 16 or more" in done.output


def test_what_cannot_be_asked_is_said(run: Run) -> None:
    assert "sm_12" in run("bench", "kernels", "--aot", "--target", "sm_12").output
    assert "--aot" in run("bench", "kernels", "--target", "sm_90").output


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_a_gpu_it_says_what_works_without_one(run: Run) -> None:
    done = run("bench", "kernels")
    assert done.exit_code == 1
    assert "lmcache bench kernels --aot" in done.output


def test_without_triton_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def no_triton(name: str, *rest: object, **more: object) -> object:
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return original(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_triton)
    done = run("bench", "kernels", "--aot")
    assert done.exit_code == 1
    assert "pip install triton" in done.output


def wall_clock(call: Callable[[], object]) -> float:
    """A clock for devices on which a call returns when its work is done."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def test_measuring_compares_both_roads_and_checks_the_bytes() -> None:
    cpu = torch.device("cpu")
    found = list(
        measure(cpu, move_rows, cases=SMALL, nbytes=1, repeat=1, programs=(None,), pin=False, clock=wall_clock)
    )
    assert found
    assert all(one.correct and one.ratio > 0 for one in found)
    assert {one.direction for one in found} == {"store", "load"}


def test_measuring_finds_a_kernel_that_moves_the_wrong_bytes() -> None:
    def shifted(copy, *, into_a, **_):  # type: ignore[no-untyped-def]
        move_rows(copy, into_a=into_a)
        move_rows(copy, into_a=not into_a) if into_a else None
        copy.a_units[:] = copy.a_units[:, ::-1]

    [first, *_] = measure(
        torch.device("cpu"), shifted, cases=SMALL, nbytes=1, repeat=1, programs=(None,), pin=False, clock=wall_clock
    )
    assert not first.correct
