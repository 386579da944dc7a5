"""Axis strings: valid strings parse, invalid ones are refused with a message that names the axis."""

from __future__ import annotations

import pytest
import torch

from lmcache.errors import LayoutError, LMCacheError, SpecError
from lmcache.layout import Axes, Layout, PagedKV
from lmcache.spec import KVSpec, LayerGroup, Plane
from lmcache_conformance.labs.engine_layouts import kv_spec, spec_of


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("block head slot (kv dim)", "block head slot (kv dim)"),
        ("  slot   one  latent ", "slot one dim"),
        ("block slot elem", "block slot dim"),
        ("(slot) head dim", "slot head dim"),
        ("block head (kv slot/16 dim/2 slot%16 dim%2)", "block head (kv slot/16 dim/2 slot%16 dim%2)"),
        ("slot%4 slot/4 dim", "slot%4 slot/4 dim"),
        ("one one slot dim", "one one slot dim"),
    ],
)
def test_axes_parse_to_a_normal_form_that_parses_to_itself(text: str, normal: str) -> None:
    assert str(Axes.parse(text)) == normal
    assert Axes.parse(normal) == Axes.parse(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "at least one"),
        ("block token head dim", "'token'"),
        ("block slot Head dim", "'Head'"),
        ("block slot head dim,", "'dim,'"),
        ("block slot head dim dim", "'dim' occurs twice"),
        ("block slot head dim latent", "'dim' occurs twice"),
        ("block batch slot dim", "'block' occurs twice"),
        ("kv kv slot dim", "'kv' occurs twice"),
        ("head dim", "'slot' is missing"),
        ("block slot/16 head dim", "'slot%16'"),
        ("block slot%16 head dim", "'slot/16'"),
        ("block slot/16 slot%8 head dim", "'slot' by different factors"),
        ("block slot/16 slot/16 head dim", "'slot' occurs twice"),
        ("block slot slot/16 slot%16 head dim", "'slot' occurs twice"),
        ("block slot head/2 head%2 dim", "'head' cannot be factored"),
        ("block slot head dim/0 dim%0", "factor"),
        ("block slot head dim/ dim%2", "'dim/'"),
        ("block slot head dim/-2", "'dim/-2'"),
        ("block slot (kv (head dim))", "not nested"),
        ("block slot (kv dim", "never closed"),
        ("block slot kv dim)", "closes nothing"),
        ("block slot () dim", "empty"),
    ],
)
def test_nonsense_is_refused_with_the_axis_named(text: str, named: str) -> None:
    with pytest.raises(LayoutError, match=r"axes|axis") as caught:
        Layout.parse(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("block_tokens", [0, -1, 1.5, "16", True])
def test_block_tokens_must_be_a_positive_integer(block_tokens: object) -> None:
    with pytest.raises(LayoutError, match="block_tokens"):
        Layout.parse("block slot dim", block_tokens=block_tokens)  # type: ignore[arg-type]


def test_factors_must_divide_what_they_split() -> None:
    with pytest.raises(LayoutError, match="factor 16 of axis 'slot'"):
        Layout.parse("block slot/16 slot%16 dim", block_tokens=24)
    kv = PagedKV([torch.zeros(4, 4, 2, 16)] * 3, Layout.parse("block slot head (kv dim/3 dim%3)", block_tokens=4))
    with pytest.raises(LayoutError, match=r"'dim/3' does not divide axis 'dim'"):
        kv.bind(kv_spec(torch.float32))


def test_a_layout_is_a_value_and_round_trips_through_its_description() -> None:
    for layout in (
        Layout.parse("block head slot (kv dim)", block_tokens=16),
        Layout.parse({"k": "block head (kv dim slot)", "v": "block head (kv slot dim)"}, block_tokens=4),
        Layout.parse("slot one latent"),
    ):
        again = Layout.from_description(layout.describe())
        assert again == layout
        assert hash(again) == hash(layout)
    assert Layout.parse("slot one latent") == Layout.parse("slot one dim")
    assert Layout.parse("slot one latent") != Layout.parse("slot dim")


@pytest.mark.parametrize(
    "data", [{}, {"axes": 3, "block_tokens": 4}, {"axes": "slot dim"}, {"axes": {}, "block_tokens": 1}]
)
def test_what_is_no_description_of_a_layout_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        Layout.from_description(data)


SPEC = kv_spec(torch.float32)  # 3 layers, 2 heads, dim 8


def bind(axes: object, tensors: object, spec: KVSpec = SPEC, block_tokens: int | None = 4) -> None:
    PagedKV(tensors, Layout.parse(axes, block_tokens=block_tokens)).bind(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("axes", "shape", "block_tokens", "named"),
    [
        ("block slot head (kv dim)", (5, 4, 2), 4, "4 dimensions"),
        ("block slot head (kv dim)", (5, 4, 3, 16), 4, "(head)"),
        ("block slot head (kv dim)", (5, 8, 2, 16), 4, "(slot)"),
        ("block slot head (kv dim)", (5, 4, 2, 8), 4, "(kv dim)"),
        ("block kv slot head dim", (5, 3, 4, 2, 8), 4, "(kv)"),
        ("block slot one head (kv dim)", (5, 4, 2, 2, 16), 4, "(one)"),
        ("(block slot) head (kv dim)", (20, 2, 16), None, "block and slot open"),
        ("(block slot) head (kv dim)", (22, 2, 16), 4, "'block'"),
        ("block slot (kv dim)", (5, 4, 16), 4, "'head' is missing"),
        ("block slot head kv", (5, 4, 2, 2), 4, "'dim' is missing"),
        ("block slot head dim", (5, 4, 2, 8), 4, "no 'kv'"),
        ("layer block slot head (kv dim)", (3, 5, 4, 2, 16), 4, "'layer' describe one tensor"),
    ],
)
def test_tensors_that_contradict_their_axes_are_refused(
    axes: str, shape: tuple[int, ...], block_tokens: int | None, named: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        bind(axes, [torch.zeros(shape) for _ in range(3)], block_tokens=block_tokens)
    assert named in str(caught.value)


def test_one_tensor_for_all_layers_needs_the_layer_axis() -> None:
    with pytest.raises(LayoutError, match="'layer'"):
        bind("block slot head (kv dim)", torch.zeros(5, 4, 2, 16))
    with pytest.raises(LayoutError, match=r"\(layer\)"):
        bind("layer block slot head (kv dim)", torch.zeros(4, 5, 4, 2, 16))


def test_layers_that_disagree_about_the_pool_are_refused() -> None:
    with pytest.raises(LayoutError, match="differ in their pages"):
        bind("block slot head (kv dim)", [torch.zeros(5, 4, 2, 16), torch.zeros(5, 4, 2, 16), torch.zeros(6, 4, 2, 16)])


def test_a_tensor_that_overlaps_itself_is_refused() -> None:
    expanded = torch.zeros(5, 4, 1, 16).expand(5, 4, 2, 16)
    with pytest.raises(LayoutError, match=r"\(head\) overlaps"):
        bind("block slot head (kv dim)", [expanded] * 3)
    sliding = torch.zeros(1000).as_strided((5, 4, 2, 16), (96, 32, 16, 1))
    with pytest.raises(LayoutError, match=r"\(block\) overlaps"):
        bind("block slot head (kv dim)", [sliding] * 3)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ([torch.zeros(5, 4, 2, 16, dtype=torch.float16)] * 3, "torch.float16"),
        ([torch.zeros(5, 4, 2, 16, dtype=torch.int32)] * 3, "torch.int32"),
        ([torch.zeros(5, 4, 2, 16)] * 2, "2 tensors for 3"),
        ([torch.zeros(5, 4, 2, 16), None, None], "NoneType"),
        (3, "int"),
        ({"k": [torch.zeros(5, 4, 2, 16)] * 3}, "['k']"),
        ([torch.zeros(5, 4, 2, 16, device="meta")] * 3, "meta"),
        ([torch.zeros(5, 4, 2, 16).to_sparse()] * 3, "sparse"),
        ({0: [torch.zeros(5, 4, 2, 16)] * 3, 1: []}, "groups"),
    ],
)
def test_tensors_that_contradict_the_spec_are_refused(tensors: object, named: str) -> None:
    with pytest.raises(SpecError) as caught:
        bind("block slot head (kv dim)", tensors)
    assert named in str(caught.value)


def test_raw_bits_of_the_same_width_are_accepted() -> None:
    spec = kv_spec(torch.float8_e4m3fn)
    bind("block slot head (kv dim)", [torch.zeros(5, 4, 2, 16, dtype=torch.uint8)] * 3, spec)


def test_planes_with_their_own_axes_must_be_planes_of_the_spec() -> None:
    tensors = [torch.zeros(5, 4, 2, 16)] * 3
    with pytest.raises(LayoutError, match="'latent'"):
        bind({"k": "block slot head (kv dim)", "latent": "block slot dim"}, tensors)
    with pytest.raises(LayoutError, match="not 'v'"):
        bind({"k": "block slot head (kv dim)"}, tensors)
    with pytest.raises(LayoutError, match="same place"):
        bind({"k": "block slot head (kv dim)", "v": "block slot head (dim kv)"}, tensors)


def test_only_a_leading_kv_may_have_parts_of_different_size() -> None:
    spec = kv_spec(torch.float32, v_dim=4)
    bind("block slot head (kv dim)", [torch.zeros(5, 4, 2, 12)] * 3, spec)
    with pytest.raises(LayoutError, match="leading 'kv'"):
        bind("block slot head (dim kv)", [torch.zeros(5, 4, 2, 12)] * 3, spec)


def test_pages_without_a_slot_axis_hold_one_token() -> None:
    spec = spec_of([("state", torch.float32, 8)], heads=1)
    bind("block dim", [torch.zeros(5, 8)] * 3, spec, block_tokens=1)
    with pytest.raises(LayoutError, match="'slot' is missing"):
        Layout.parse("block dim", block_tokens=4)


def test_several_groups_take_a_mapping_and_may_have_their_own_layouts() -> None:
    planes = (Plane("k", "float32", 8), Plane("v", "float32", 8))
    spec = KVSpec.of_groups("m", (LayerGroup("full", (0, 2), planes, 2), LayerGroup("sliding", (1,), planes, 2)))
    packed = Layout.parse("block slot head (kv dim)", block_tokens=4)
    apart = Layout.parse("slot head dim")
    full = [torch.zeros(5, 4, 2, 16)] * 2
    sliding = {"k": [torch.zeros(12, 2, 8)], "v": [torch.zeros(12, 2, 8)]}
    kv = PagedKV({0: full, 1: sliding}, {0: packed, 1: apart}).bind(spec)
    assert (kv.num_slots(0), kv.num_slots(1)) == (20, 12)
    assert (kv.block_tokens(0), kv.block_tokens(1)) == (4, 1)
    with pytest.raises(SpecError, match="2 groups"):
        PagedKV(full, packed).bind(spec)
    with pytest.raises(LayoutError, match="'sliding'"):
        PagedKV({0: full, 1: sliding}, {0: packed}).bind(spec)


def test_binding_is_checked_once_per_spec() -> None:
    paged = PagedKV([torch.zeros(5, 4, 2, 16)] * 3, Layout.parse("block slot head (kv dim)", block_tokens=4))
    bound = paged.bind(kv_spec(torch.float32))  # made now: engines set switches of arithmetic when they load
    assert paged.bind(kv_spec(torch.float32)) is bound
    with pytest.raises(LMCacheError):
        paged.bind(kv_spec(torch.float32, heads=3))


def test_a_rank_without_layers_of_the_group_is_refused() -> None:
    spec = SPEC.shard(layers=(7, 9))
    with pytest.raises(SpecError, match="holds none"):
        bind("block slot head (kv dim)", [], spec)
