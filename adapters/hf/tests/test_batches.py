"""Padded batches: mapping of tokens to columns, and batched hits that equal recomputation in the same split."""

from __future__ import annotations

from typing import Any

import hflab as lab
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from lmcache_hf import CachedModel
from lmcache_hf.batch import Prompt


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows of unequal length."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), lab.PAD)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[r, place] = row
        mask[r, place] = 1
    return ids, mask


def rows_of(lengths: list[int], seed: int = 5) -> list[torch.Tensor]:
    return [lab.prompt(n, seed=seed + i)[0] for i, n in enumerate(lengths)]


def expected_columns(mask: torch.Tensor, hits: list[int], stop: int) -> int:
    """The definition, by brute force."""
    best = 0
    for columns in range(1, stop + 1):
        needs = mask[:, :columns].sum(1).tolist()
        if all(need <= hit for need, hit in zip(needs, hits, strict=True)) and max(needs) > 0:
            best = columns
    return best


def filled_by_hand(model: Any, donors: list[DynamicCache], mask: torch.Tensor, columns: int) -> DynamicCache:
    """A stock cache whose row r has, token by token, the KV of row 0 of `donors[r]`; padding columns are zero."""
    cache = DynamicCache(config=model.config)
    for layer in range(len(donors[0].layers)):
        tensors = []
        for name in ("keys", "values"):
            donor = getattr(donors[0].layers[layer], name)
            out = torch.zeros(len(donors), donor.shape[1], columns, donor.shape[3], dtype=donor.dtype)
            for r, other in enumerate(donors):
                token = 0
                for column in range(columns):
                    if mask[r, column]:
                        out[r, :, column] = getattr(other.layers[layer], name)[0, :, token]
                        token += 1
            tensors.append(out)
        cache.update(*tensors, layer)
    return cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mla"])
def test_a_padded_batch_hits_what_single_rows_stored(side: str, dtype: torch.dtype, name: str) -> None:
    model = lab.MODELS[name]().to(dtype)
    rows = rows_of([70, 41, 90])
    with CachedModel(model, lab.config()) as cached:
        donors = []
        for row in rows:
            donors.append(DynamicCache(config=model.config))
            lab.greedy(model, row[None], past_key_values=donors[-1])
            lab.greedy(cached, row[None])
        ids, mask = padded(rows, side)
        hits = [cached.hit_tokens(torch.cat([row, row[:1]])) for row in rows]
        assert hits == [64, 32, 80]
        columns = expected_columns(mask, hits, ids.shape[1] - 1)
        # left: min(20 + 64, 49 + 32, 80); right: the second row's hit
        assert columns == {"left": 80, "right": 32}[side]
        before = cached.stats()["hit_tokens"]
        got = lab.greedy(cached, ids, attention_mask=mask)
        assert cached.stats()["hit_tokens"] - before == int(mask[:, :columns].sum())
        reference = filled_by_hand(model, donors, mask, columns)
        lab.assert_same(got, lab.greedy(model, ids, attention_mask=mask, past_key_values=reference))
        if dtype == torch.float32:
            assert got.sequences.tolist() == lab.greedy(model, ids, attention_mask=mask).sequences.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma", "mla"])
def test_what_a_padded_batch_stored_serves_its_rows_alone(side: str, name: str) -> None:
    model = lab.MODELS[name]()
    rows = rows_of([70, 41, 90])
    ids, mask = padded(rows, side)
    with CachedModel(model, lab.config()) as cached:
        out = lab.greedy(cached, ids, new=24, attention_mask=mask)
        assert out.sequences.tolist() == lab.greedy(model, ids, new=24, attention_mask=mask).sequences.tolist()
        generated = out.sequences[:, ids.shape[1] :]
        for r, row in enumerate(rows):
            whole = torch.cat([row, generated[r], lab.prompt(9, seed=r)[0]])
            known = len(row) + 23
            if side == "right" and r != 2:
                known = len(row)  # generated tokens after padding have other positions than without padding
            assert cached.hit_tokens(whole) == known // lab.CHUNK * lab.CHUNK
            got, plain = lab.greedy(cached, whole[None]), lab.greedy(model, whole[None])
            assert got.sequences.tolist() == plain.sequences.tolist()
            # Padding affects KV only through rounding: an error of one column or position would be a thousand times larger.
            torch.testing.assert_close(got.logits[0], plain.logits[0], rtol=1e-3, atol=1e-3)


def test_rows_of_a_sliding_model_that_agree_on_a_boundary_hit_bit_for_bit() -> None:
    model = lab.gemma()
    rows = rows_of([70, 70])
    ids = torch.stack(rows)
    reference = lab.recorded_cache(model)
    with CachedModel(model, lab.config()) as cached:
        first = lab.greedy(cached, ids)
        lab.greedy(model, ids, past_key_values=reference)
        more = lab.continued(first, 9, seed=1)
        got = lab.greedy(cached, more)
        assert cached.stats()["hit_tokens"] == 2 * 80
        lab.assert_same(got, lab.greedy(model, more, past_key_values=lab.cut(reference, 80)))


def test_rows_of_a_sliding_model_padded_by_whole_chunks_hit() -> None:
    model = lab.gemma()
    rows = rows_of([80, 80 - lab.CHUNK])
    ids, mask = padded(rows, "left")
    with CachedModel(model, lab.config()) as cached:
        first = lab.greedy(cached, ids, attention_mask=mask, new=17)
        more = torch.cat([first.sequences, lab.prompt(5, seed=9, rows=2)], 1)
        mask = torch.cat([mask, torch.ones(2, 22, dtype=mask.dtype)], 1)
        got = lab.greedy(cached, more, attention_mask=mask)
        assert cached.stats()["hit_tokens"] == 96 + 80
        assert got.sequences.tolist() == lab.greedy(model, more, attention_mask=mask).sequences.tolist()


def test_rows_of_a_sliding_model_that_cannot_agree_are_computed() -> None:
    model = lab.gemma()
    rows = rows_of([70, 65])
    ids, mask = padded(rows, "left")
    with CachedModel(model, lab.config()) as cached:
        for _ in range(2):
            got = lab.greedy(cached, ids, attention_mask=mask)
            lab.assert_same(got, lab.greedy(model, ids, attention_mask=mask))
        assert cached.stats()["hit_tokens"] == 0
        assert cached.stats()["uncached"] == {}


def test_padding_that_generate_infers_from_pad_tokens_is_understood() -> None:
    model = lab.llama()
    rows = rows_of([70, 41])
    ids, _ = padded(rows, "left")
    model.generation_config.pad_token_id = lab.PAD
    with CachedModel(model, lab.config()) as cached:
        for _ in range(2):
            got, plain = lab.greedy(cached, ids), lab.greedy(model, ids)
            assert got.sequences.tolist() == plain.sequences.tolist()
        assert cached.hit_tokens(torch.cat([rows[1], rows[1][:1]])) == 32
        assert cached.stats()["hit_tokens"] > 0


def test_pad_tokens_are_content_where_the_pad_token_also_ends_a_sequence() -> None:
    model = lab.llama()
    ids = lab.prompt(70)
    ids[0, :9] = lab.PAD
    with CachedModel(model, lab.config()) as cached:
        more: dict[str, Any] = {"pad_token_id": lab.PAD, "eos_token_id": lab.PAD}
        for _ in range(2):
            got, plain = lab.greedy(cached, ids, **more), lab.greedy(model, ids, **more)
            assert got.sequences.tolist() == plain.sequences.tolist()
        assert cached.hit_tokens(ids[0]) == 64


def test_a_row_that_ends_early_stores_nothing_behind_its_end() -> None:
    model = lab.llama()
    ids = torch.stack(rows_of([70, 70]))
    end = int(lab.greedy(model, ids).sequences[0, 75])
    with CachedModel(model, lab.config()) as cached:
        more: dict[str, Any] = {"eos_token_id": end, "pad_token_id": lab.PAD, "new": 60}
        out = lab.greedy(cached, ids, **more)
        assert out.sequences.tolist() == lab.greedy(model, ids, **more).sequences.tolist()
        short, long = out.sequences
        assert short[-1] == lab.PAD
        assert cached.hit_tokens(short) == 64
        assert cached.hit_tokens(long) >= 112


def test_behind_a_hole_in_the_mask_nothing_is_stored_or_hit() -> None:
    model = lab.llama()
    ids = lab.prompt(90)
    mask = torch.ones_like(ids)
    mask[0, 40:53] = 0
    bare = ids[mask.bool()]
    with CachedModel(model, lab.config()) as cached:
        first = lab.greedy(cached, ids, attention_mask=mask)
        assert cached.hit_tokens(bare) == 32
        lab.greedy(cached, bare[None])
        assert cached.hit_tokens(bare) == 64
        again = lab.greedy(cached, ids, attention_mask=mask)
        assert again.sequences.tolist() == first.sequences.tolist()
        assert cached.stats()["hit_tokens"] == 32 + 32


# ------------------------------------------------------------------ the arithmetic alone

masks = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 12).flatmap(
        lambda columns: st.lists(
            st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(masks, st.data())
def test_shared_columns_is_the_most_that_every_row_has(mask: list[list[bool]], data: st.DataObject) -> None:
    held = torch.tensor(mask)
    prompt = Prompt(torch.arange(held.numel()).view_as(held), held)
    hits = data.draw(st.lists(st.integers(0, 12), min_size=len(mask), max_size=len(mask)))
    stop = data.draw(st.integers(0, prompt.columns))
    assert prompt.shared_columns(hits, stop) == expected_columns(held, hits, stop)


@settings(max_examples=150, deadline=None)
@given(masks, st.data())
def test_slots_name_the_column_of_each_token_and_nothing_else(mask: list[list[bool]], data: st.DataObject) -> None:
    held = torch.tensor(mask)
    prompt = Prompt(torch.arange(held.numel()).view_as(held), held)
    first = data.draw(st.integers(0, prompt.columns))
    last = data.draw(st.integers(first, prompt.columns))
    pool = prompt.ids[:, first:last].reshape(-1)
    for row in range(prompt.rows):
        tokens = prompt.tokens(row)
        slots = prompt.slots(row, first=first, last=last, count=len(tokens))
        columns = [c for c in range(prompt.columns) if mask[row][c]]
        assert len(slots) == len(tokens) == len(columns)
        for token, slot, column in zip(tokens, slots.tolist(), columns, strict=True):
            assert (slot >= 0) == (first <= column < last)
            assert slot < 0 or pool[slot] == token


@settings(max_examples=100, deadline=None)
@given(masks)
def test_a_gap_is_the_first_padding_after_a_token(mask: list[list[bool]]) -> None:
    held = torch.tensor(mask)
    prompt = Prompt(torch.zeros(held.shape, dtype=torch.int64), held)
    for row, gap in enumerate(prompt.gaps().tolist()):
        found = [c for c in range(prompt.columns) if not mask[row][c] and any(mask[row][:c])]
        assert gap == (found[0] if found else prompt.columns)
