"""Any layout, strides, slots and bits, drawn by Hypothesis, against naive index arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowlab import copy_rows as move_rows

from lmcache.errors import LayoutError
from lmcache.layout import BoundKV, Layout, ObjectLayout, ObjectPlane, PagedKV, gather, scatter, translate
from lmcache.layout.rows import row_copies
from lmcache.spec import KVSpec
from lmcache_conformance.labs.engine_layouts import Index, Lab, kv_spec, spec_of

DTYPES = [
    torch.bfloat16,
    torch.float32,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]

Atoms = list[tuple[str, str, int]]  # name, op, factor


def atom_text(atom: tuple[str, str, int]) -> str:
    name, op, factor = atom
    return f"{name}{op}{factor}" if op else name


def axes_text(dims: Sequence[Atoms]) -> str:
    return " ".join(f"({' '.join(map(atom_text, d))})" if len(d) > 1 else atom_text(d[0]) for d in dims)


@st.composite
def arrangements(draw: st.DrawFn, names: Sequence[str], sizes: dict[str, int], splits: Sequence[str]) -> list[Atoms]:
    """Draws axes in any order, some split into quotient and remainder, some adjacent ones composed into one dimension."""
    atoms: Atoms = []
    for name in names:
        divisors = [d for d in range(2, sizes[name]) if sizes[name] % d == 0] if name in splits else []
        factor = draw(st.sampled_from([0, *divisors]))
        atoms += [(name, "/", factor), (name, "%", factor)] if factor else [(name, "", 0)]
    atoms = draw(st.permutations(atoms))
    dims: list[Atoms] = [[atoms[0]]]
    for atom in atoms[1:]:
        if draw(st.integers(0, 3)) == 0:
            dims[-1].append(atom)
        else:
            dims.append([atom])
    return dims


def atom_size(atom: tuple[str, str, int], sizes: dict[str, int]) -> int:
    name, op, factor = atom
    return {"": sizes[name], "/": sizes[name] // (factor or 1), "%": factor}[op]


@st.composite
def strided(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Draws a tensor of this shape within a larger one, with its dimensions in any physical order."""
    order = draw(st.permutations(range(len(shape))))
    pads = [draw(st.integers(0, 2)) for _ in shape]
    storage = torch.zeros([shape[i] + pads[i] for i in order], dtype=dtype)
    view = storage.permute([order.index(i) for i in range(len(shape))])
    for i, extent in enumerate(shape):
        view = view.narrow(i, draw(st.integers(0, pads[i])), extent)
    return view


@st.composite
def labs(draw: st.DrawFn) -> Lab:
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim, bt = draw(st.sampled_from([1, 2, 4, 6, 8])), draw(st.sampled_from([1, 2, 4, 6]))
    blocks = draw(st.integers(3, 6))
    pool, one_tensor, together = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    dtypes = {"k": draw(st.sampled_from(DTYPES))}
    dtypes["v"] = dtypes["k"] if together else draw(st.sampled_from(DTYPES))
    elems = {"k": dim, "v": dim if together else draw(st.sampled_from([1, 3, 6]))}
    spec = spec_of([(p, dtypes[p], elems[p]) for p in "kv"], layers=layers, heads=heads)
    slots = blocks * bt
    sizes = {
        "block": blocks,
        "slot": slots if pool else bt,
        "head": heads,
        "dim": dim,
        "kv": 2,
        "layer": layers,
        "one": 1,
    }
    names = ["slot", "head", "dim", *([] if pool else ["block"]), *(["layer"] if one_tensor else [])]
    names += ["one"] * draw(st.integers(0, 1))
    splits = ["dim"] if pool else ["dim", "slot"]
    planes = ("kv",) if together else ("k", "v")
    per_plane = {p: {**sizes, "dim": elems[p[0]]} for p in planes}
    dims = {p: draw(arrangements([*names, "kv"] if together else names, per_plane[p], splits)) for p in planes}
    tensors = {
        p: [
            draw(strided([prod(atom_size(a, per_plane[p]) for a in d) for d in dims[p]], dtypes[p[0]]))
            for _ in range(1 if one_tensor else layers)
        ]
        for p in planes
    }

    def locate(plane: str, layer: int, s: torch.Tensor, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, Index]:
        place = {"block": s // bt, "slot": s if pool else s % bt, "head": h, "dim": e, "one": torch.zeros_like(s)}
        where = "kv" if together else plane
        index = []
        for d in dims[where]:
            at = torch.zeros_like(s)
            for name, op, factor in d:
                value = place.get(name, torch.full_like(s, layer if name == "layer" else int(plane == "v")))
                value = {"": value, "/": value // (factor or 1), "%": value % (factor or 1)}[op]
                at = at * atom_size((name, op, factor), per_plane[where]) + value
            index.append(at)
        return tensors[where][0 if one_tensor else layer], tuple(index)

    axes = axes_text(dims["kv"]) if together else {p: axes_text(dims[p]) for p in planes}
    given_tensors = {p: t[0] if one_tensor else t for p, t in tensors.items()}
    lab = Lab(
        "any", axes, None if pool else bt, spec, given_tensors["kv"] if together else given_tensors, locate, slots
    )
    lab.randomize(draw(st.integers(0, 2**31)))
    return lab


@st.composite
def object_layouts(draw: st.DrawFn, spec: KVSpec, kv: BoundKV, tokens: int) -> ObjectLayout:
    """Draws the canonical, the native, or any other dense arrangement with the layer outermost."""
    kind = draw(st.sampled_from(["canonical", "native", "any"]))
    if kind == "canonical":
        return ObjectLayout.canonical(spec, 0, tokens)
    if kind == "native":
        return kv.native(0, tokens)
    group = spec.groups[0]
    block = draw(st.sampled_from([d for d in range(1, tokens + 1) if tokens % d == 0]))
    sizes = {"block": tokens // block, "slot": block, "head": group.kv_heads, "dim": group.planes[0].elems, "kv": 2}
    names = ["block", "slot", "head", "dim"]
    alike = len({(p.dtype, p.elems) for p in group.planes}) == 1
    if alike and draw(st.booleans()):
        dims = draw(arrangements([*names, "kv"], sizes, ["slot", "dim"]))
        texts = [axes_text(dims)] * 2
    else:
        each = [{**sizes, "dim": p.elems} for p in group.planes]
        texts = [axes_text(draw(arrangements(names, its, ["slot", "dim"]))) for its in each]
    planes = tuple(
        ObjectPlane(p.name, p.dtype, p.elems, f"layer {text}", block)
        for p, text in zip(group.planes, texts, strict=True)
    )
    return ObjectLayout(planes, len(group.layers), group.kv_heads, tokens).checked()


def bind(lab: Lab) -> BoundKV:
    return PagedKV(lab.tensors, Layout.parse(lab.axes, block_tokens=lab.block_tokens)).bind(lab.spec)  # type: ignore[arg-type]


def move(kv: BoundKV, layout: ObjectLayout, slots: torch.Tensor, objects: list[torch.Tensor], *, into_a: bool) -> None:
    """Executes the `RowCopy`s of an accelerator's kernels byte by byte."""
    for copy in row_copies(kv.groups[0], layout, slots.numpy(), [item.data_ptr() for item in objects]):
        move_rows(copy, into_a=into_a)


@st.composite
def slot_lists(draw: st.DrawFn, lab: Lab, kv: BoundKV, count: int) -> torch.Tensor:
    """Draws `count` distinct slots: shuffled, consecutive, or whole pages shuffled, in order within a page or not."""
    kind = draw(st.sampled_from(["shuffled", "row", "pages", "inside pages"]))
    if kind == "row":
        start = draw(st.integers(0, lab.num_slots - count))
        return torch.arange(start, start + count)
    if "pages" in kind:
        block = kv.block_tokens(0)
        pages = torch.tensor(draw(st.permutations(range(lab.num_slots // block))))
        tokens = torch.tensor(draw(st.permutations(range(block)))) if kind == "inside pages" else torch.arange(block)
        return (pages[:, None] * block + tokens).reshape(-1)[:count]
    return torch.tensor(draw(st.permutations(range(lab.num_slots))))[:count]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_gather_and_translate_give_exactly_the_named_elements(data: st.DataObject) -> None:
    lab = data.draw(labs())
    kv = bind(lab)
    tokens = data.draw(st.integers(1, lab.num_slots // 2))
    count = data.draw(st.integers(1, 2))
    slots = data.draw(slot_lists(lab, kv, count * tokens))
    layout = data.draw(object_layouts(lab.spec, kv, tokens))
    outs = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(count)]
    gather(kv, 0, slots, outs, layout)
    by_rows = [torch.zeros_like(out) for out in outs]
    move(kv, layout, slots, by_rows, into_a=False)
    assert all(map(torch.equal, by_rows, outs))
    canonical = ObjectLayout.canonical(lab.spec, 0, tokens)
    for i, out in enumerate(outs):
        back = torch.zeros_like(out)
        translate(out, layout, back, canonical)
        assert torch.equal(back, lab.canonical(slots[i * tokens : (i + 1) * tokens]))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_scatter_gives_back_every_bit_and_changes_no_other_byte(data: st.DataObject) -> None:
    lab = data.draw(labs())
    kv = bind(lab)
    tokens = data.draw(st.integers(1, lab.num_slots // 2))
    count = data.draw(st.integers(1, 2))
    slots = data.draw(slot_lists(lab, kv, count * tokens))
    layout = data.draw(object_layouts(lab.spec, kv, tokens))
    outs = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(count)]
    gather(kv, 0, slots, outs, layout)
    group = lab.spec.groups[0]
    places = [(plane, layer) for plane in group.planes for layer in range(len(group.layers))]
    values = [lab.read(plane, layer, slots) for plane, layer in places]
    skipped = torch.tensor([data.draw(st.integers(0, 3)) == 0 for _ in range(len(slots))])
    lab.randomize(7)
    for (plane, layer), value in zip(places, values, strict=True):
        lab.write(plane, layer, slots[~skipped], value[~skipped])
    expected = [storage.clone() for storage in lab.storages()]
    lab.randomize(7)
    scatter(outs, layout, kv, 0, torch.where(skipped, -1, slots))
    for storage, want in zip(lab.storages(), expected, strict=True):
        assert torch.equal(storage, want)
    lab.randomize(7)
    move(kv, layout, torch.where(skipped, -1, slots), outs, into_a=True)
    for storage, want in zip(lab.storages(), expected, strict=True):
        assert torch.equal(storage, want), "by rows"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_translation_between_any_two_layouts_is_the_detour_over_canonical(data: st.DataObject) -> None:
    lab = data.draw(labs())
    kv = bind(lab)
    tokens = data.draw(st.integers(1, 12))
    one = data.draw(object_layouts(lab.spec, kv, tokens))
    two = data.draw(object_layouts(lab.spec, kv, tokens))
    canonical = ObjectLayout.canonical(lab.spec, 0, tokens)
    src = torch.randint(0, 256, (one.nbytes,), dtype=torch.uint8)
    direct, middle, detour = (torch.zeros_like(src) for _ in range(3))
    translate(src, one, direct, two)
    translate(src, one, middle, canonical)
    translate(middle, canonical, detour, two)
    assert torch.equal(direct, detour)
    back = torch.zeros_like(src)
    translate(direct, two, back, one)
    assert torch.equal(back, src)
    if one.signature == two.signature:
        assert torch.equal(src, direct)
    elif one.nbytes > 64:  # fewer random bytes may be equal by chance
        assert not torch.equal(src, direct)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_object_layout_is_a_value_that_round_trips_through_json(data: st.DataObject) -> None:
    import json

    lab = data.draw(labs())
    kv = bind(lab)
    layout = data.draw(object_layouts(lab.spec, kv, data.draw(st.integers(1, 12))))
    again = ObjectLayout.from_description(json.loads(json.dumps(layout.describe())))
    assert again == layout
    assert hash(again) == hash(layout)
    segments = layout.segments()
    assert [s.offset for s in segments] == [sum(t.nbytes for t in segments[:i]) for i in range(len(segments))]
    assert sum(s.nbytes for s in segments) == layout.nbytes == lab.spec.object_bytes(0, layout.tokens)


GOOD = ObjectLayout.canonical(kv_spec(torch.bfloat16), 0, 8).describe()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_description_is_refused_or_still_a_dense_layout(data: st.DataObject) -> None:
    """File headers are untrusted: no exception but `LayoutError`, and no huge allocation."""
    junk = st.one_of(
        st.none(),
        st.integers(-(2**70), 2**70),
        st.text(max_size=9),
        st.lists(st.integers(-1, 9), max_size=5),
        st.floats(),
    )
    planes = [dict(p) for p in GOOD["planes"]]
    description = {"order": GOOD["order"], "planes": planes}
    target = data.draw(st.sampled_from([description, planes[0], planes[1]]))
    key = data.draw(st.sampled_from([*target, "more"]))
    if data.draw(st.booleans()):
        target[key] = data.draw(junk)
    else:
        target.pop(key, None)
    try:
        layout = ObjectLayout.from_description(description)
    except LayoutError:
        return
    assert sum(s.nbytes for s in layout.segments()) == layout.nbytes


@pytest.mark.parametrize(
    "axes",
    [
        "slot head dim",
        "block layer slot head dim",
        "layer slot head",
        "layer block head dim",
        "layer slot/3 slot%3 head dim",
    ],
)
def test_object_axes_must_be_dense_with_the_layer_outermost(axes: str) -> None:
    planes = (ObjectPlane("k", "bfloat16", 8, axes, 4), ObjectPlane("v", "bfloat16", 8, "layer slot head dim", 8))
    with pytest.raises(LayoutError):
        ObjectLayout(planes, 3, 2, 8).checked()


@pytest.mark.parametrize(
    ("axes", "block_tokens"),
    [
        (("layer one (batch kv head slot dim)",) * 2, (16, 1)),
        (("layer head (slot kv dim%8 block dim/8)",) * 2, (16, 8)),
        (("layer (slot kv head) dim", "layer (head kv slot) dim"), (16, 16)),
    ],
)
def test_planes_that_would_overlap_are_refused(axes: tuple[str, str], block_tokens: tuple[int, int]) -> None:
    """A header's layout is untrusted, and both planes' copies would go to the same bytes."""
    planes = [
        {"name": name, "dtype": "float32", "shape": [2, 16, 2, 8], "axes": text, "block_tokens": block}
        for name, text, block in zip("kv", axes, block_tokens, strict=True)
    ]
    with pytest.raises(LayoutError, match="would overlap"):
        ObjectLayout.from_description({"order": "native", "planes": planes})


def test_planes_in_one_dimension_may_differ_where_they_do_not_overlap() -> None:
    texts = ("layer slot (kv head dim)", "layer slot (kv dim head)")
    planes = [
        {"name": name, "dtype": "float32", "shape": [2, 16, 2, 8], "axes": text, "block_tokens": 16}
        for name, text in zip("kv", texts, strict=True)
    ]
    assert ObjectLayout.from_description({"order": "native", "planes": planes}).nbytes == 2 * 2 * 16 * 2 * 8 * 4
