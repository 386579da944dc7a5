"""Slots are checked before anything is copied."""

from __future__ import annotations

import pytest
import torch

from lmcache.errors import LayoutError, SlotError, SpecError
from lmcache.layout import Layout, ObjectLayout, PagedKV, gather, scatter, translate, validate_slots
from lmcache_conformance.labs.engine_layouts import LABS


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_slots_of_any_integer_type_become_int64(dtype: torch.dtype) -> None:
    slots = validate_slots(torch.tensor([3, 1, 2, 0], dtype=dtype), 4, 3, unique=True)
    assert slots.dtype == torch.int64
    assert slots.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("slots", "named"),
    [
        (torch.tensor([0, 1, 4]), "slot 4 at position 2"),
        (torch.tensor([0, -2, 1]), "slot -2 at position 1"),
        (torch.tensor([0, 1]), "(3,)"),
        (torch.tensor([[0, 1, 2]]), "(1, 3)"),
        (torch.tensor([0.0, 1.0, 2.0]), "torch.float32"),
        (torch.tensor([True, False, True]), "torch.bool"),
        ([0, 1, 2], "list"),
    ],
)
def test_slots_that_cannot_be_are_refused(slots: object, named: str) -> None:
    with pytest.raises(SlotError) as caught:
        validate_slots(slots, 4, 3, unique=False)  # type: ignore[arg-type]
    assert named in str(caught.value)


def test_a_destination_takes_one_token_but_may_be_missing_often() -> None:
    twice = torch.tensor([5, -1, 2, -1, 5])
    validate_slots(twice, 8, 5, unique=False)
    with pytest.raises(SlotError, match="slot 5 is named twice, at positions 0 and 4"):
        validate_slots(twice, 8, 5, unique=True)
    validate_slots(torch.tensor([5, -1, 2, -1]), 8, 4, unique=True)
    validate_slots(torch.empty(0, dtype=torch.int64), 8, 0, unique=True)


def test_nothing_moves_when_a_call_is_wrong() -> None:
    lab = LABS["vllm packed LBHNC"]()
    lab.randomize(0)
    kv = PagedKV(lab.tensors, Layout.parse(lab.axes, block_tokens=lab.block_tokens)).bind(lab.spec)  # type: ignore[arg-type]
    layout = kv.native(0, 8)
    before = [storage.clone() for storage in lab.storages()]
    src, out = torch.ones(layout.nbytes, dtype=torch.uint8), torch.zeros(layout.nbytes, dtype=torch.uint8)
    good = torch.arange(8)
    for slots in (good + lab.num_slots - 7, good - 1, good[:7], good.to(torch.int32)):
        with pytest.raises(SlotError):
            gather(kv, 0, slots, [out], layout)
    for slots in (good + lab.num_slots - 7, good - 2, good[:7], torch.zeros(8, dtype=torch.int64)):
        with pytest.raises(SlotError):
            scatter([src], layout, kv, 0, slots)
    for buffer in (src[1:], src.to(torch.int8), src.repeat(2)[::2], src.view(2, -1)):
        with pytest.raises(LayoutError):
            scatter([buffer], layout, kv, 0, good)
        with pytest.raises(LayoutError):
            gather(kv, 0, good, [buffer], layout)
    foreign = LABS["vllm mla"]()
    other = ObjectLayout.canonical(foreign.spec, 0, 8)
    with pytest.raises(SpecError):
        gather(kv, 0, good, [torch.zeros(other.nbytes, dtype=torch.uint8)], other)
    with pytest.raises(LayoutError):
        translate(src, layout, torch.zeros(other.nbytes, dtype=torch.uint8), other)
    assert not out.any()
    assert all(torch.equal(a, b) for a, b in zip(before, lab.storages(), strict=True))


def test_no_objects_are_no_work() -> None:
    lab = LABS["vllm packed LBHNC"]()
    kv = PagedKV(lab.tensors, Layout.parse(lab.axes, block_tokens=lab.block_tokens)).bind(lab.spec)  # type: ignore[arg-type]
    none = torch.empty(0, dtype=torch.int64)
    gather(kv, 0, none, [], kv.native(0, 8))
    scatter([], kv.native(0, 8), kv, 0, none)
