"""The parts of the engine suite: models, cases, histories, damage."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lmcache.errors import FormatError
from lmcache.format.file import canonical_form, verify_file
from lmcache.keys import ObjectId
from lmcache.spec import KVSpec
from lmcache_conformance.contract import Capabilities, Request, Response
from lmcache_conformance.engines.bench import History, cases_for, on, same_bits, same_tokens, varied
from lmcache_conformance.labs.damage import DAMAGES, object_files, poison, problem_of, read_raw
from lmcache_conformance.labs.models import TINY, build

SPEC = KVSpec.uniform(model="m", layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)
TOKENS = 16


def write_objects(folder: Path, count: int = 4) -> list[Path]:
    form = canonical_form(SPEC, 0, TOKENS)
    for depth in range(count):
        id = ObjectId(b"n" * 32, bytes([depth]) * 32, 0, SPEC.rects[0], TOKENS, depth)
        payload = random.Random(depth).randbytes(form.nbytes)
        (l0, l1), (h0, h1) = id.rect.layers, id.rect.heads
        name = f"{id.chain.hex()}.0.L{l0}-{l1}.H{h0}-{h1}.{depth}.{TOKENS}.safetensors"
        place = folder / "objects" / id.namespace.hex() / id.chain.hex()[:2] / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"".join(form.encode(id, memoryview(payload))))
    return object_files(folder)


# ------------------------------------------------------------------ raw files


def test_whole_files_have_no_problem_and_come_in_order_of_depth(tmp_path: Path) -> None:
    files = write_objects(tmp_path, 12)
    assert [read_raw(path).meta["depth"] for path in files] == list(range(12))
    assert [problem_of(path) for path in files] == [None] * 12


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_a_problem_for_the_suites_reader_and_for_ours(tmp_path: Path, kind: str) -> None:
    for seed in range(20):
        files = write_objects(tmp_path / str(seed))
        DAMAGES[kind](files, random.Random(seed))
        for path in files:
            if path.exists():
                assert problem_of(path) is not None, f"seed {seed}"
                if (
                    kind != "swapped with others"
                ):  # such a file is intact: only a reader that knows the id can detect it
                    with pytest.raises(FormatError):
                        verify_file(path)


def test_poisoned_files_are_whole_and_hold_other_values(tmp_path: Path) -> None:
    for path in write_objects(tmp_path):
        before = read_raw(path).payload
        poison(path)
        assert problem_of(path) is None
        verify_file(path)
        assert read_raw(path).payload != before


# ------------------------------------------------------------------ models and cases


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_gives_the_same_weights_and_another_one_others(name: str) -> None:
    one, same, other = build(name, 1), build(name, 1), build(name, 2)
    for (key, a), b, c in zip(one.state_dict().items(), same.parameters(), other.parameters(), strict=False):
        assert a.shape == b.shape == c.shape, key
    weights = [model.get_output_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_cases_are_what_is_claimed_and_the_budget_allows() -> None:
    claims = Capabilities(models=("llama", "gemma3", "smollm2"), dtypes=("float32", "bfloat16"))

    @on("gemma3", dtypes=1)
    def narrow() -> None: ...

    @on(exact_only=True)
    def exact() -> None: ...

    def names(test: object, budget: str) -> list[str]:
        return [str(case) for case in cases_for(test, claims, budget)]

    both = ["llama-float32", "llama-bfloat16", "gemma3-float32", "gemma3-bfloat16"]
    assert names(print, "quick") == both
    assert names(print, "full") == [*both, "smollm2-float32", "smollm2-bfloat16"]
    assert names(narrow, "quick") == ["gemma3-float32"]
    assert names(narrow, "full") == names(print, "full")
    assert names(exact, "full") == ["llama-float32", "gemma3-float32", "smollm2-float32"]


# ------------------------------------------------------------------ checks


def test_a_history_knows_what_can_be_a_hit() -> None:
    history = History()
    history.add(Request(tokens=(1, 2, 3)), Response(tokens=(4, 5)))
    history.add(Request(tokens=(1, 9), salt="a"), Response())
    assert history.longest(Request(tokens=(1, 2, 3, 4, 6))) == 4
    assert history.longest(Request(tokens=(1, 9, 9), salt="a")) == 2
    assert history.longest(Request(tokens=(1, 2), salt="b")) == 0
    history.forget("a")
    assert history.longest(Request(tokens=(1, 9, 9), salt="a")) == 0
    assert history.longest(Request(tokens=(1, 2, 3))) == 3


def test_answers_are_compared_to_the_bit() -> None:
    zero = Response(tokens=(7,), logprobs=(b"\x00\x00\x00\x00",), logprob=(0.0,))
    minus = Response(tokens=(7,), logprobs=(b"\x00\x00\x00\x80",), logprob=(-0.0,))
    same_bits(zero, zero, "itself")
    same_tokens(zero, minus, "tokens alone")
    with pytest.raises(AssertionError, match="why: the log-probs of generated token 1 differ in 1 of 4 bytes"):
        same_bits(zero, minus, "why")
    with pytest.raises(AssertionError, match="why: wrong tokens from generated token 2 on"):
        same_tokens(Response(tokens=(7, 8)), Response(tokens=(7, 9)), "why")
    with pytest.raises(AssertionError, match="the comparison proves nothing"):
        varied([zero, zero])
