"""Gather, scatter and translate for every engine's layout equal naive index arithmetic, and no other byte changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from interpreted import interpreted
from rowlab import copy_rows as move_rows

import lmcache.layout.move
import lmcache.layout.paged
import lmcache_kernels.reference
from lmcache.layout import BoundKV, Layout, ObjectLayout, PagedKV, gather, scatter, translate
from lmcache_conformance.labs.engine_layouts import LABS, Lab
from lmcache_kernels import RowCopy


@pytest.fixture(params=["host", "pages", "device", "rows", "triton"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The copy path: host memory; host memory, always by page; as on a device, by torch operations; as on a device, by
    `RowCopy`s executed naively; as on a device, by Triton kernels.
    """
    if request.param == "pages":
        monkeypatch.setattr(lmcache.layout.move, "worth_it", lambda dims, into_a: True)
    if request.param in ("host", "pages"):
        return str(request.param)
    for module in (lmcache_kernels.reference, lmcache.layout.move, lmcache.layout.paged):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)

    movers = {"rows": move_rows}
    if request.param == "triton":
        movers["triton"] = interpreted("triton_copy").copy_rows

    def by_kernel(copies: Sequence[RowCopy], *, into_a: bool, device: torch.device) -> bool:
        for copy in copies if request.param in movers else ():
            movers[request.param](copy, into_a=into_a, device=device)
        return request.param in movers

    monkeypatch.setattr(lmcache.layout.move, "copy_by_kernel", by_kernel)
    return str(request.param)


def bind(lab: Lab) -> BoundKV:
    return PagedKV(lab.tensors, Layout.parse(lab.axes, block_tokens=lab.block_tokens)).bind(lab.spec)  # type: ignore[arg-type]


def slot_patterns(kv: BoundKV, tokens: int) -> dict[str, torch.Tensor]:
    """Slots of two objects: whole pages in any order, a run that starts within a page, and random slots."""
    total, block = kv.num_slots(0), kv.block_tokens(0)
    torch.manual_seed(0)
    patterns = {"run": torch.arange(3, 3 + 2 * tokens), "chaos": torch.randperm(total)[: 2 * tokens]}
    if tokens % block == 0:
        pages = torch.randperm(total // block)[: 2 * tokens // block]
        patterns["pages"] = (pages[:, None] * block + torch.arange(block)).reshape(-1)
        rest = torch.tensor([s for s in range(total) if s not in set(patterns["pages"][:tokens].tolist())])
        patterns["one object in pages, one not"] = torch.cat(
            [patterns["pages"][:tokens], rest[torch.randperm(len(rest))][:tokens]]
        )
    return patterns


def object_layouts(lab: Lab, kv: BoundKV, tokens: int) -> dict[str, ObjectLayout]:
    """Canonical, this engine's native order, and the native orders of other engines with the same spec."""
    found = {"canonical": ObjectLayout.canonical(lab.spec, 0, tokens), "native": kv.native(0, tokens)}
    for name, other in LABS.items():
        foreign = other()
        if foreign.spec == lab.spec:
            found[name] = bind(foreign).native(0, tokens)
    return found


def tokens_of(lab: Lab) -> int:
    return 32 if lab.name == "vllm cpu amx" else 8


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("name", LABS)
def test_gather_reads_what_the_engine_holds_in_any_object_order(name: str) -> None:
    lab = LABS[name]()
    lab.randomize(1)
    kv, tokens = bind(lab), tokens_of(lab)
    assert kv.num_slots(0) == lab.num_slots
    canonical = ObjectLayout.canonical(lab.spec, 0, tokens)
    for label, slots in slot_patterns(kv, tokens).items():
        for order, layout in object_layouts(lab, kv, tokens).items():
            outs = [torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8) for _ in range(2)]
            gather(kv, 0, slots, outs, layout)
            for i, out in enumerate(outs):
                back = torch.empty_like(out)
                translate(out, layout, back, canonical)
                assert torch.equal(back, lab.canonical(slots[i * tokens : (i + 1) * tokens])), (label, order)


@pytest.mark.parametrize("holes", ["none", "scattered", "pages", "all"])
@pytest.mark.parametrize("name", LABS)
def test_scatter_writes_the_named_slots_and_not_one_byte_more(name: str, holes: str, road: str) -> None:
    if road == "triton" and holes != "scattered":
        pytest.skip("the interpreter does a megabyte a second: one kind of holes is enough")
    lab = LABS[name]()
    kv, tokens = bind(lab), tokens_of(lab)
    block = kv.block_tokens(0)
    canonical = ObjectLayout.canonical(lab.spec, 0, tokens)
    for slots in slot_patterns(kv, tokens).values():
        lab.randomize(2)
        wanted = [lab.canonical(slots[i * tokens : (i + 1) * tokens]) for i in range(2)]
        named = slots.clone()
        if holes == "scattered":
            named[::3] = -1
        elif holes == "pages":
            named[: max(block, 2)] = -1
        elif holes == "all":
            named[:] = -1
        for layout in object_layouts(lab, kv, tokens).values():
            srcs = [torch.empty(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
            for src, want in zip(srcs, wanted, strict=True):
                translate(want, canonical, src, layout)
            # Expected memory: new random content, with the listed slots written one by one.
            lab.randomize(2)
            values = {
                (p.name, i): lab.read(p, i, slots)
                for p in lab.spec.groups[0].planes
                for i in range(kv.groups[0].layers)
            }
            lab.randomize(3)
            keep = named >= 0
            for plane in lab.spec.groups[0].planes:
                for layer in range(kv.groups[0].layers):
                    lab.write(plane, layer, slots[keep], values[plane.name, layer][keep])
            after = [storage.clone() for storage in lab.storages()]
            lab.randomize(3)
            scatter(srcs, layout, kv, 0, named)
            for storage, expected in zip(lab.storages(), after, strict=True):
                assert torch.equal(storage, expected)


@pytest.mark.parametrize("name", LABS)
def test_a_range_of_layers_moves_alone(name: str) -> None:
    lab = LABS[name]()
    lab.randomize(4)
    kv, tokens = bind(lab), tokens_of(lab)
    slots = torch.randperm(lab.num_slots)[:tokens]
    for layout in (kv.native(0, tokens), ObjectLayout.canonical(lab.spec, 0, tokens)):
        whole = torch.empty(layout.nbytes, dtype=torch.uint8)
        gather(kv, 0, slots, [whole], layout)
        part = torch.zeros(layout.nbytes, dtype=torch.uint8)
        gather(kv, 0, slots, [part], layout, slice(1, 2))
        for segment in layout.segments():
            piece = slice(segment.offset, segment.offset + segment.nbytes)
            assert torch.equal(part[piece], whole[piece] if segment.layer == 1 else torch.zeros_like(whole[piece]))
        before = {i: [lab.read(p, i, torch.arange(lab.num_slots)) for p in lab.spec.groups[0].planes] for i in range(2)}
        scatter([255 - whole], layout, kv, 0, slots, slice(1, None))
        lab_after = [lab.read(p, 0, torch.arange(lab.num_slots)) for p in lab.spec.groups[0].planes]
        assert all(torch.equal(a, b) for a, b in zip(before[0], lab_after, strict=True))
        changed = [lab.read(p, 1, slots) for p in lab.spec.groups[0].planes]
        assert all(torch.equal(a, ~b[slots]) for a, b in zip(changed, before[1], strict=True))
        lab.randomize(4)


def test_native_order_is_the_engines_page_order() -> None:
    expected = {
        "vllm packed LBHNC": "layer block head slot (kv dim)",
        "vllm packed LBNHC": "layer block slot head (kv dim)",
        "vllm packed BHLNC": "layer block head slot (kv dim)",
        "vllm cpu amx": "layer block head (kv slot/16 dim/2 slot%16 dim%2)",
        "vllm cpu vec": "layer block head (kv dim slot)",
        "flashinfer nhd": "layer block (kv slot head dim)",
        "flashinfer hnd": "layer block (kv head slot dim)",
        "flash attention": "layer slot head dim",
        "sglang mha": "layer slot head dim",
        "sglang host page_head": "layer block head slot dim",
        "hf": "layer head slot dim",
        "unequal": "layer block slot head (kv dim)",
        "factored pool": "layer block head slot dim",
    }
    for name, axes in expected.items():
        lab = LABS[name]()
        layout = bind(lab).native(0, tokens_of(lab))
        assert layout.planes[0].axes == axes, name
        assert layout.order == ("canonical" if axes == "layer slot head dim" else "native"), name


def test_native_falls_back_to_canonical_where_tokens_are_no_whole_pages() -> None:
    kv = bind(LABS["vllm packed LBHNC"]())
    assert kv.native(0, 6).order == "canonical"
    assert bind(LABS["hf"]()).native(0, 7).planes[0].axes == "layer head slot dim"


@pytest.mark.parametrize(
    ("name", "strips", "loops", "run"),
    [  # tokens per page × bytes per token and layer, in the fewest runs that the engine's layout allows
        ("vllm packed LBHNC", 1, 1, 4 * 64),
        ("vllm packed LBNHC", 1, 1, 4 * 64),
        ("vllm packed BLHNC", 1, 1, 4 * 64),
        ("vllm packed BHLNC", 1, 2, 4 * 32),  # heads of a page are not adjacent
        ("vllm cpu vec", 1, 1, 4 * 128),
        ("vllm cpu amx", 1, 1, 32 * 256),
        ("flashinfer nhd", 1, 1, 4 * 64),
        ("flashinfer hnd", 1, 1, 4 * 64),
        ("flash attention", 2, 1, 4 * 32),  # K and V are separate
        ("vllm mla", 1, 1, 4 * 48),
        ("unequal", 1, 1, 4 * 80),
        ("factored pool", 2, 1, 4 * 16),
    ],
)
def test_equal_page_order_moves_whole_pages(name: str, strips: int, loops: int, run: int) -> None:
    lab = LABS[name]()
    kv, tokens = bind(lab), tokens_of(lab)
    layout = kv.native(0, tokens)
    gather(kv, 0, torch.arange(tokens), [torch.empty(layout.nbytes, dtype=torch.uint8)], layout)
    (plan,) = (plan for (_, by_page), plan in kv.groups[0].plans.items() if by_page)
    assert [(len(strip.dims), strip.run) for strip in plan.strips] == [(loops, run)] * strips


@pytest.mark.parametrize(("name", "run"), [("sglang mha", 8 * 32), ("hf", 8 * 16), ("sglang host page_first", 32)])
def test_tokens_that_follow_each_other_move_as_one_run(name: str, run: int) -> None:
    lab = LABS[name]()
    kv = bind(lab)
    layout = kv.native(0, 8)
    gather(kv, 0, torch.arange(8) + 3, [torch.empty(layout.nbytes, dtype=torch.uint8)], layout)
    (plan,) = (plan for plan in kv.groups[0].plans.values() if plan is not None)
    ((part, *_),) = plan.parts.values()
    assert part.rows.dims[-1] == (run, 1)


def test_the_same_shape_with_two_heads_is_two_different_layouts() -> None:
    one, two = LABS["ambiguous head (kv dim)"](), LABS["ambiguous kv (head dim)"]()
    assert [t.shape for t in one.all_tensors()] == [t.shape for t in two.all_tensors()]
    one.randomize(5)
    two.randomize(5)
    slots = torch.arange(8)
    outs = []
    for lab in (one, two):
        kv = bind(lab)
        layout = ObjectLayout.canonical(lab.spec, 0, 8)
        out = torch.empty(layout.nbytes, dtype=torch.uint8)
        gather(kv, 0, slots, [out], layout)
        outs.append(out)
    assert not torch.equal(outs[0], outs[1])
