"""A spec describes a KV cache and rejects inconsistencies."""

from __future__ import annotations

import msgspec
import pytest
import torch

from lmcache.errors import SpecError
from lmcache.spec import KVSpec, LayerGroup, Plane, Rect, dtype_name, trailing

PLANES = (Plane("k", "bfloat16", 64), Plane("v", "bfloat16", 64))


def test_sizes_of_smollm2() -> None:
    spec = KVSpec.uniform("m", layers=30, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    assert spec.bytes_per_token(0) == 23_040
    assert spec.object_bytes(0, 256) == 23_040 * 256
    assert spec.local_layers(0) == tuple(range(30))


def test_planes_may_differ_in_size_and_dtype() -> None:
    group = LayerGroup("mla", (0, 1), (Plane("latent", "uint8", 576), Plane("scale", "float32", 4)), 1)
    spec = KVSpec.of_groups("m", [group])
    assert spec.bytes_per_token(0) == 2 * (576 + 16)


@pytest.mark.parametrize(
    ("kv_heads", "tp", "expected"),
    [(8, 2, [(0, 4), (4, 8)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]), (1, 2, [(0, 1), (0, 1)])],
)
def test_heads_are_split_over_ranks_and_replicated_where_there_are_too_few(
    kv_heads: int, tp: int, expected: list[tuple[int, int]]
) -> None:
    spec = KVSpec.uniform("m", layers=2, kv_heads=kv_heads, head_dim=8, dtype="float32")
    assert [spec.shard(tp_rank=r, tp_size=tp).rects[0].heads for r in range(tp)] == expected


def test_a_pipeline_stage_holds_its_layers_only() -> None:
    full = LayerGroup("full", (0, 3), PLANES, 2)
    sliding = LayerGroup("sliding", (1, 2), PLANES, 2, trailing(7))
    spec = KVSpec.of_groups("m", [full, sliding]).shard(layers=(2, 4))
    assert spec.local_layers(0) == (3,)
    assert spec.local_layers(1) == (2,)


GROUP = LayerGroup("g", (0, 1), PLANES, 2)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([], "at least one"),
        ([msgspec.structs.replace(GROUP, layers=())], "ascending"),
        ([msgspec.structs.replace(GROUP, layers=(1, 0))], "ascending"),
        ([msgspec.structs.replace(GROUP, layers=(-1, 0))], "negative"),
        ([GROUP, msgspec.structs.replace(GROUP, name="h")], "already belongs to group 'g'"),
        ([msgspec.structs.replace(GROUP, kv_heads=0)], "kv_heads"),
        ([msgspec.structs.replace(GROUP, planes=())], "planes"),
        ([msgspec.structs.replace(GROUP, planes=(PLANES[0], PLANES[0]))], "distinct"),
        ([msgspec.structs.replace(GROUP, planes=(Plane("k", "bfloat17", 1),))], "bfloat17"),
        ([msgspec.structs.replace(GROUP, planes=(Plane("k", "float16", 0),))], "at least 1 element"),
    ],
)
def test_contradictions_are_named(groups: list[LayerGroup], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        KVSpec.of_groups("m", groups)


def test_impossible_shards_and_rects_are_named() -> None:
    spec = KVSpec.uniform("m", layers=2, kv_heads=3, head_dim=8, dtype="float32")
    with pytest.raises(SpecError, match="3 kv heads, not divisible by tp_size=2"):
        spec.shard(tp_rank=0, tp_size=2)
    with pytest.raises(SpecError, match=r"\[0, 2\)"):
        spec.shard(tp_rank=2, tp_size=2)
    with pytest.raises(SpecError, match="tp_size=4"):
        spec.shard(tp_size=4)
    with pytest.raises(SpecError, match="heads"):
        msgspec.structs.replace(spec, rects=(Rect((0, 2), (0, 4)),)).validate()
    with pytest.raises(SpecError, match="rects"):
        msgspec.structs.replace(spec, rects=()).validate()
    with pytest.raises(SpecError, match="window"):
        trailing(0)
    with pytest.raises(SpecError, match="torch dtype"):
        dtype_name("bf16")


def test_a_spec_survives_serialisation() -> None:
    spec = KVSpec.of_groups("m", [GROUP])
    assert msgspec.json.decode(msgspec.json.encode(spec), type=KVSpec) == spec
