"""The layout proof accepts the true layout of every engine and rejects every false one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lmcache.layout.proof
from lmcache.layout import BoundKV, Layout, PagedKV, scatter
from lmcache.layout.proof import Proof, Values, prove
from lmcache_conformance.labs.engine_layouts import (
    LABS,
    Lab,
    bits,
    kv_spec,
    plain,
    spec_of,
    vllm_cpu_amx,
    vllm_cpu_vec,
    vllm_packed,
)


def bind(lab: Lab, axes: object = None) -> BoundKV:
    layout = Layout.parse(axes or lab.axes, block_tokens=lab.block_tokens)  # type: ignore[arg-type]
    return PagedKV(lab.tensors, layout).bind(lab.spec)  # type: ignore[arg-type]


Change = Callable[[str, int, torch.Tensor, torch.Tensor], tuple[str, int, torch.Tensor, torch.Tensor]]


def writer(lab: Lab, change: Change | None = None) -> Callable[..., None]:
    """The engine's write path, by the lab's own index arithmetic; `change` makes it wrong."""

    def write(group: int, layer: int, slots: torch.Tensor, values: Values) -> None:
        planes = {p.name: p for p in lab.spec.groups[group].planes}
        for name, value in values.items():
            n, i, s, v = change(name, layer, slots, value) if change else (name, layer, slots, value)
            lab.write(planes[n], i, s, v)

    return write


def reader(lab: Lab) -> Callable[..., Values]:
    def read(group: int, layer: int, slots: torch.Tensor) -> Values:
        return {p.name: lab.read(p, layer, slots).view(p.torch_dtype) for p in lab.spec.groups[group].planes}

    return read


def scratch(lab: Lab) -> torch.Tensor:
    """The slots of two non-adjacent pages, shuffled."""
    block = lab.block_tokens or 4
    first, last = 1, lab.num_slots // block - 1
    pages = [torch.arange(block) + page * block for page in (first, last)]
    return torch.cat(pages)[torch.randperm(2 * block, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("name", LABS)
def test_the_true_layout_is_proven_and_other_slots_are_left_alone(name: str) -> None:
    lab = LABS[name]()
    lab.randomize(0)
    slots = scratch(lab)
    others = torch.tensor([s for s in range(lab.num_slots) if s not in set(slots.tolist())])
    before = [lab.read(p, i, others) for p in lab.spec.groups[0].planes for i in range(len(lab.spec.groups[0].layers))]
    assert prove(bind(lab), lab.spec, writer(lab), slots, read=reader(lab)) == Proof(True)
    after = [lab.read(p, i, others) for p in lab.spec.groups[0].planes for i in range(len(lab.spec.groups[0].layers))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


DTYPES = "float8_e4m3fn float8_e5m2 int8 uint8 float16 float64 bool complex64 int64"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_dtype_can_be_proven(dtype: str) -> None:
    lab = plain("block kv slot head dim", getattr(torch, dtype), heads=4, bt=4)
    assert prove(bind(lab), lab.spec, writer(lab), scratch(lab), read=reader(lab))
    assert not prove(bind(lab, "block kv head slot dim"), lab.spec, writer(lab), scratch(lab))


def square(axes: str) -> Lab:
    """As many heads as slots per page, so that both orders have the same shape."""
    return plain(axes, heads=4, bt=4)


FALSE = {
    "two heads, K‖V per head taken for heads per plane": (
        lambda: LABS["ambiguous head (kv dim)"](),
        "block slot kv (head dim)",
    ),
    "two heads, heads per plane taken for K‖V per head": (
        lambda: LABS["ambiguous kv (head dim)"](),
        "block slot head (kv dim)",
    ),
    "heads and slots swapped": (lambda: square("block kv slot head dim"), "block kv head slot dim"),
    "K and V interleaved instead of side by side": (lambda: vllm_packed("LBHNC"), "block head slot (dim kv)"),
    "vec taken for plain packing": (vllm_cpu_vec, "block head (slot kv dim)"),
    "vec taken for K‖V without transposition": (vllm_cpu_vec, "block head (kv slot dim)"),
    "vec taken with V transposed": (vllm_cpu_vec, "block head (kv dim slot)"),
    "amx taken for plain packing": (vllm_cpu_amx, "block head (slot kv dim)"),
    "amx taken for vec": (vllm_cpu_amx, {"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"}),
    "amx V taken for K's packing": (vllm_cpu_amx, "block head (kv slot/16 dim/2 slot%16 dim%2)"),
    "amx with a wrong factor": (
        vllm_cpu_amx,
        {"k": "block head (kv slot/16 dim/4 slot%16 dim%4)", "v": "block head (kv dim/16 slot/2 dim%16 slot%2)"},
    ),
    "amx slots in the wrong order": (
        vllm_cpu_amx,
        {"k": "block head (kv slot%16 dim/2 slot/16 dim%2)", "v": "block head (kv dim/16 slot/2 dim%16 slot%2)"},
    ),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_layout_of_the_same_shape_is_told_from_the_true_one(name: str) -> None:
    make, axes = FALSE[name]
    lab = make()
    lab.randomize(0)
    before = [storage.clone() for storage in lab.storages()]
    proof = prove(bind(lab, axes), lab.spec, writer(lab), scratch(lab))
    assert not proof
    assert "plane" in proof.reason
    assert "gather reads" in proof.reason
    # `scatter` never runs on an unproven layout: only the engine wrote, and only into the scratch slots.
    kept = [s for s in range(lab.num_slots) if s not in set(scratch(lab).tolist())]
    changed = [storage.clone() for storage in lab.storages()]
    for storage, old in zip(lab.storages(), before, strict=True):
        storage.copy_(old)
    was = [lab.read(p, 0, torch.tensor(kept)) for p in lab.spec.groups[0].planes]
    for storage, new in zip(lab.storages(), changed, strict=True):
        storage.copy_(new)
    assert all(
        torch.equal(a, lab.read(p, 0, torch.tensor(kept))) for a, p in zip(was, lab.spec.groups[0].planes, strict=True)
    )


WRONG_ENGINES = {
    "K and V swapped": lambda n, i, s, v: ("v" if n == "k" else "k", i, s, v),
    "slots off by one": lambda n, i, s, v: (n, i, s - 1, v),
    "only the second page off by one": lambda n, i, s, v: (n, i, torch.where(s > 8, s - 1, s), v),
    "layers swapped": lambda n, i, s, v: (n, 2 - i, s, v),
    "heads reversed": lambda n, i, s, v: (n, i, s, v.flip(1)),
    "elements rotated": lambda n, i, s, v: (n, i, s, v.roll(1, 2)),
    "interleaved halves": lambda n, i, s, v: (n, i, s, v.view(*v.shape[:2], 2, -1).transpose(2, 3).reshape(v.shape)),
    "tokens reversed": lambda n, i, s, v: (n, i, s.flip(0), v),
    "V never written": lambda n, i, s, v: (n, i, s, v if n == "k" else torch.zeros_like(v)),
    "values rounded": lambda n, i, s, v: (n, i, s, (bits(v) & ~1).view(v.dtype)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in WRONG_ENGINES
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool)
        if (name, dtype) != ("values rounded", torch.bool)  # a bool without its lowest bit is not a bool
    ],
)
def test_an_engine_that_writes_elsewhere_or_otherwise_is_found_out(name: str, dtype: torch.dtype) -> None:
    lab = plain("kv block slot head dim", dtype)
    lab.randomize(0)
    assert not prove(bind(lab), lab.spec, writer(lab, WRONG_ENGINES[name]), scratch(lab))


def test_an_engine_that_reads_otherwise_is_found_out() -> None:
    lab = plain("kv block slot head dim")
    kv = bind(lab)

    def swapped(group: int, layer: int, slots: torch.Tensor) -> Values:
        values = reader(lab)(group, layer, slots)
        return {"k": values["v"], "v": values["k"]}

    proof = prove(kv, lab.spec, writer(lab), scratch(lab), read=swapped)
    assert not proof
    assert "the engine reads" in proof.reason
    assert not prove(
        kv, lab.spec, writer(lab), scratch(lab), read=lambda *a: {"k": torch.zeros(1), "v": torch.zeros(1)}
    )


@pytest.mark.parametrize(
    ("slot", "named"),
    [
        (None, "after scatter, gather reads"),
        ("scratch", "after scatter, gather reads"),
        ("foreign", "outside of the slots"),
    ],
)
def test_a_scatter_that_misses_or_writes_too_much_is_found_out(
    slot: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes nothing; one scratch slot too many; another sequence's slot."""
    lab = plain("kv block slot head dim")
    lab.randomize(0)
    plane = lab.spec.groups[0].planes[0]

    def broken(srcs: object, layout: object, kv: object, group: int, slots: torch.Tensor, layers: slice) -> None:
        if slot is None:
            return
        scatter(srcs, layout, kv, group, slots, layers)  # type: ignore[arg-type]
        other = scratch(lab)[slots == -1][:1] if slot == "scratch" else torch.tensor([0])
        lab.write(plane, layers.start, other, ~lab.read(plane, layers.start, other))

    monkeypatch.setattr(lmcache.layout.proof, "scatter", broken)
    proof = prove(bind(lab), lab.spec, writer(lab), scratch(lab))
    assert not proof
    assert named in proof.reason


def test_whatever_the_engine_raises_is_an_unproven_layout() -> None:
    lab = plain("kv block slot head dim")

    def write(*args: object) -> None:
        raise RuntimeError("no kernel for this shape")

    proof = prove(bind(lab), lab.spec, write, scratch(lab))
    assert not proof
    assert "no kernel for this shape" in proof.reason


@pytest.mark.parametrize(
    ("slots", "named"),
    [
        (torch.tensor([4, 5]), "places in a page"),
        (torch.tensor([4, 5, 6, 7]), "1 pages"),
        (torch.tensor([4, 5, 6, 8, 9, 10]), "3 of 4"),
        (torch.tensor([4, 5, 6, 7, 8, 9, 10, -1]), "real slots"),
        (torch.tensor([4, 5, 6, 7, 8, 9, 10, 4]), "twice"),
        (torch.tensor([4, 5, 6, 7, 8, 9, 10, 99]), "outside"),
    ],
)
def test_scratch_slots_that_cannot_prove_it_are_refused(slots: torch.Tensor, named: str) -> None:
    lab = plain("kv block slot head dim")
    proof = prove(bind(lab), lab.spec, writer(lab), slots)
    assert not proof
    assert named in proof.reason


def test_scratch_slots_of_a_pool_without_pages_need_only_be_several() -> None:
    lab = LABS["sglang mha"]()
    assert prove(bind(lab), lab.spec, writer(lab), torch.tensor([9, 3, 17, 4]))
    assert not prove(bind(lab), lab.spec, writer(lab), torch.tensor([9, 3, 17]))


def test_only_the_layers_asked_for_are_written() -> None:
    lab = plain("kv block slot head dim")
    lab.randomize(0)
    middle = lab.read(lab.spec.groups[0].planes[0], 1, torch.arange(lab.num_slots))
    assert prove(bind(lab), lab.spec, writer(lab), scratch(lab), layers=(0, 2))
    assert torch.equal(middle, lab.read(lab.spec.groups[0].planes[0], 1, torch.arange(lab.num_slots)))


def test_a_wide_model_needs_more_passes_than_a_small_dtype_has_values() -> None:
    """fp8 has about a hundred safe values; elements 128 apart would be equal in a single pass."""
    lab = plain("kv block slot head dim", torch.float8_e4m3fn)
    spec = spec_of([("latent", torch.float8_e4m3fn, 4096)], layers=1, heads=1)
    tensor = torch.zeros(7, 4, 4096, dtype=torch.float8_e4m3fn)
    kv = PagedKV([tensor], Layout.parse("block slot latent", block_tokens=4)).bind(spec)

    def write(group: int, layer: int, slots: torch.Tensor, values: Values, shift: int = 0) -> None:
        bits(tensor)[slots // 4, slots % 4] = bits(values["latent"])[:, 0].roll(shift, 1)

    assert prove(kv, spec, write, scratch(lab))
    period = 119
    for shift in (period, period + 1, 2 * period, 112, 126, 127, 128):
        assert not prove(kv, spec, lambda g, i, s, v, by=shift: write(g, i, s, v, by), scratch(lab))


def test_several_groups_are_proven_with_their_own_slots() -> None:
    one, two = plain("kv block slot head dim"), LABS["vllm mla"]()
    spec_one = kv_spec(torch.bfloat16)
    groups = (spec_one.groups[0], two.spec.groups[0].__class__("mla", (3, 4, 5), two.spec.groups[0].planes, 1))
    spec = spec_one.of_groups("two", groups)
    layouts = {0: Layout.parse(one.axes, block_tokens=4), 1: Layout.parse(two.axes, block_tokens=4)}  # type: ignore[arg-type]
    kv = PagedKV({0: one.tensors, 1: two.tensors}, layouts).bind(spec)  # type: ignore[dict-item]

    def write(group: int, layer: int, slots: torch.Tensor, values: Values) -> None:
        writer((one, two)[group])(0, layer, slots, values)

    assert prove(kv, spec, write, {0: scratch(one), 1: scratch(two)})
    swapped = prove(kv, spec, write, {0: scratch(one), 1: scratch(two)[:3]})
    assert not swapped
    assert "'mla'" in swapped.reason
