"""Selection of the copy implementation per device, and the fallback when kernels cannot run."""

from __future__ import annotations

import logging

import pytest
import torch
from rowlab import copy_rows as move_rows

import lmcache_kernels.dispatch as dispatch
from lmcache.layout import gather, scatter
from lmcache.observe.metrics import Metrics
from lmcache_conformance.labs.engine_layouts import LABS
from lmcache_kernels import CopyError, RowCopy, copy_by_kernel, fallbacks

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_served_by_torch", {})


def broken(copy: RowCopy, **_: object) -> None:
    raise RuntimeError("ptxas fatal: no such architecture\nand much more")


def test_a_kernel_that_cannot_compile_is_tried_once_told_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(dispatch, "kernel_for", lambda device: (asked.append(device), broken)[1])
    metrics = Metrics()
    metrics.kernel_fallbacks(lambda: float(len(fallbacks())))
    copies = [object()]
    with caplog.at_level(logging.WARNING, "lmcache"):
        for _ in range(3):
            assert not copy_by_kernel(copies, into_a=False, device=CUDA)  # type: ignore[arg-type]
    assert len(asked) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "kernels-unavailable device=cuda detail='RuntimeError: ptxas fatal: no such architecture'; "
        "slower tensor operations copy instead"
    ]
    assert fallbacks() == {"cuda": "RuntimeError: ptxas fatal: no such architecture\nand much more"}
    assert metrics.registry.get_sample_value("lmcache_kernel_fallbacks") == 1


def test_an_unknown_device_is_served_by_tensor_operations() -> None:
    assert not copy_by_kernel([object()], into_a=True, device=torch.device("hpu"))  # type: ignore[list-item]
    assert "hpu" in fallbacks()["hpu"]


def test_a_wrong_copy_is_an_error_and_no_reason_to_give_up_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(copy: RowCopy, **_: object) -> None:
        raise CopyError("rows overlap")

    monkeypatch.setattr(dispatch, "kernel_for", lambda device: refuses)
    with pytest.raises(CopyError, match="overlap"):
        copy_by_kernel([object()], into_a=True, device=CUDA)  # type: ignore[list-item]
    assert not fallbacks()


@pytest.mark.parametrize("works", [True, False], ids=["by kernel", "kernel breaks"])
def test_gather_and_scatter_give_the_same_bytes_whether_kernels_run_or_not(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache.layout import Layout, PagedKV, move, paged
    from lmcache_kernels import reference

    for module in (reference, move, paged):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)
    monkeypatch.setattr(dispatch, "kernel_for", lambda device: move_rows if works else broken)
    lab = LABS["sglang mha"]()
    lab.randomize(7)
    kv = PagedKV(lab.tensors, Layout.parse(lab.axes, block_tokens=lab.block_tokens)).bind(lab.spec)  # type: ignore[arg-type]
    layout = kv.native(0, 8)
    [there] = [torch.zeros(layout.nbytes, dtype=torch.uint8)]
    gather(kv, 0, torch.arange(8), [there], layout)
    before = [storage.clone() for storage in kv.groups[0].storages]
    scatter([there], layout, kv, 0, torch.arange(8))
    assert there.any()
    assert all(torch.equal(a, b) for a, b in zip(before, kv.groups[0].storages, strict=True))
    assert bool(fallbacks()) is not works
