"""Keys never change silently, and invalid input is refused. What must change a key is tested in the conformance suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.errors import TokenError
from lmcache.keys import NAMES_VERSION, Extra, as_tokens, chain_of, chain_of_keys, namespace_of, scoped
from lmcache.spec import KVSpec, LayerGroup, Numerics, Plane, trailing

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())

SPEC = KVSpec.uniform(
    "org/model@abc",
    layers=4,
    kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    numerics=Numerics(engine="e", engine_version="1", attention_backend="sdpa", isa="x", dtype="bfloat16"),
)


def ns(spec: KVSpec = SPEC, **changes: object) -> bytes:
    return namespace_of(spec, **({"chunk_tokens": 16} | changes))  # type: ignore[arg-type]


def hybrid() -> KVSpec:
    planes = (Plane("k", "float16", 32), Plane("v", "float16", 32))
    full = LayerGroup("full", (0, 2), planes, 2)
    sliding = LayerGroup("sliding", (1, 3), planes, 2, trailing(511))
    return KVSpec.of_groups("hybrid", (full, sliding), Numerics(engine="e"))


def meant(meaning: str) -> KVSpec:
    return msgspec.structs.replace(SPEC, meaning=meaning)


CASES = {
    "plain": lambda: chain_of(ns(), np.arange(48, dtype=np.uint32), 16),
    "salt and lora": lambda: chain_of(ns(salt="tenant-a", lora="f00d"), np.arange(32, dtype=np.uint32), 16),
    "semantic": lambda: chain_of(ns(share="semantic"), np.arange(16, dtype=np.uint32), 16),
    "weights version": lambda: chain_of(ns(weights_version="7"), np.arange(16, dtype=np.uint32), 16),
    "chunk 256": lambda: chain_of(ns(chunk_tokens=256), np.arange(512, dtype=np.uint32), 256),
    "extras": lambda: chain_of(
        ns(), np.arange(48, dtype=np.uint32), 16, [Extra(20, 20, b"d" * 32), Extra(3, 2, b"e" * 16)]
    ),
    "keys of the caller": lambda: chain_of_keys(scoped(ns(), "pages"), ["a", b"b"]),
    "meaning": lambda: chain_of(ns(meant("f00d")), np.arange(16, dtype=np.uint32), 16),
    "meaning, semantic": lambda: chain_of(ns(meant("f00d"), share="semantic"), np.arange(16, dtype=np.uint32), 16),
    "hybrid": lambda: chain_of(ns(hybrid()), np.full(16, 2**32 - 1, dtype=np.uint32), 16),
}


@pytest.mark.parametrize("case", CASES)
def test_names_are_frozen(case: str) -> None:
    """A failure means that every existing cache becomes unusable: that must be deliberate, with a new NAMES_VERSION."""
    assert VECTORS["version"] == NAMES_VERSION
    chain = CASES[case]()
    assert [d.hex() for d in chain.digests] == VECTORS["chains"][case]


def test_a_name_is_the_documented_formula() -> None:
    from blake3 import blake3

    tokens = np.arange(32, dtype="<u4")
    first = blake3(b"chunk" + ns() + (16).to_bytes(4, "little") + tokens[:16].tobytes()).digest()
    second = blake3(b"chunk" + first + (16).to_bytes(4, "little") + tokens[16:].tobytes()).digest()
    assert list(chain_of(ns(), tokens, 16).digests) == [first, second]


def test_names_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_keys import CASES\n"
        "import json; print(json.dumps({n: [d.hex() for d in c().digests] for n, c in CASES.items()}))"
    )
    for seed in ("0", "12345"):
        out = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        assert json.loads(out) == VECTORS["chains"]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, -1], "-1"),
        ([1, 2**32], str(2**32)),
        (np.array([5, -3]), "-3"),
        (np.array([2**40]), str(2**40)),
        (np.array([[1, 2]]), "one-dimensional"),
        (np.array([1.0]), "integers"),
        (torch.tensor([1.5]), "integers"),
        (torch.tensor([[1]]), "one-dimensional"),
        ([1.5], "integer"),
        (["a"], "integer"),
        ("abc", "tokenizer"),
        ([[1, 2]], "integer"),
        (np.array([True]), "integers"),
    ],
)
def test_what_are_not_token_ids_is_refused_naming_the_value(tokens: object, says: str) -> None:
    with pytest.raises(TokenError, match=says.replace("[", r"\[")):
        as_tokens(tokens)  # type: ignore[arg-type]


def test_rects_and_group_names_do_not_change_the_namespace() -> None:
    assert ns(SPEC.shard(tp_rank=1, tp_size=2)) == ns()
    renamed = msgspec.structs.replace(SPEC, groups=(msgspec.structs.replace(SPEC.groups[0], name="other"),))
    assert ns(renamed) == ns()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.data())
def test_a_digest_covers_all_tokens_up_to_its_chunk_and_none_after(tokens: list[int], data: st.DataObject) -> None:
    chain = chain_of(ns(), as_tokens(tokens), 8)
    assert len(chain.digests) == len(tokens) // 8
    if not tokens:
        return
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    other = chain_of(ns(), as_tokens(changed), 8)
    assert chain.digests[: at // 8] == other.digests[: at // 8]
    assert not set(chain.digests[at // 8 :]) & set(other.digests)


def test_extras_come_in_any_order_and_short_digests_are_refused() -> None:
    tokens = as_tokens(range(32))
    a, b = Extra(1, 2, b"a" * 16), Extra(5, 2, b"b" * 16)
    assert chain_of(ns(), tokens, 16, [a, b]) == chain_of(ns(), tokens, 16, [b, a])
    for bad, says in ((Extra(0, 1, b"ab"), "16"), (Extra(-1, 1, b"a" * 16), "start"), (Extra(0, 0, b"a" * 16), "span")):
        with pytest.raises(TokenError, match=says):
            chain_of(ns(), tokens, 16, [bad])


@pytest.mark.parametrize("share", ["exact", "semantic"])
def test_meaning_separates_under_either_way_of_sharing(share: str) -> None:
    names = {ns(meant(meaning), share=share) for meaning in ("", "a", "b")}
    assert len(names) == 3


def test_shards_keep_the_meaning() -> None:
    assert meant("a").shard(tp_rank=1, tp_size=2).meaning == "a"


def test_a_meaning_given_to_a_constructor_is_kept() -> None:
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 8, "dtype": "float16"}
    spec = KVSpec.uniform("m", **shape, meaning="a")  # type: ignore[arg-type]
    assert spec.meaning == KVSpec.of_groups("m", spec.groups, meaning="a").meaning == "a"
