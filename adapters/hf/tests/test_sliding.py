"""Sliding-window layers: restored to the exact state that processing leaves; columns that left the window are stored too."""

from __future__ import annotations

from typing import Any

import hflab as lab
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmcache_hf import CachedModel, compat


@pytest.mark.parametrize("window", [2, 3, 7, lab.CHUNK, lab.CHUNK + 1, 24, 40, 200])
def test_any_window_hits_bit_for_bit(window: int) -> None:
    model = lab.gemma(window=window)
    reference = lab.recorded_cache(model)
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for number in range(3):
            hit = cached.hit_tokens(ids)
            got = lab.greedy(cached, ids)
            lab.assert_same(got, lab.greedy(model, ids, past_key_values=lab.cut(reference, hit)))
            ids = lab.continued(got, 9, seed=number)
        assert cached.stats()["hit_tokens"] == 80 + 96
        assert cached.stats()["uncached"] == {}


@pytest.mark.parametrize("columns", [1, 10, 23, 24, 25, 60])
def test_a_filled_layer_is_in_the_state_that_processing_leaves(columns: int) -> None:
    model = lab.gemma()
    ids = lab.prompt(columns)
    processed, recording = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(ids, past_key_values=processed)
    assert compat.arm(recording, processed)
    model(ids, past_key_values=recording)
    for want, donor in zip(processed.layers, recording.layers, strict=True):
        kept = min(columns, compat.window_of(want) or columns)
        keys, values = (x[:, :, columns - kept :].clone() for x in compat.columns_of(donor))
        assert compat.columns_of(donor)[0].shape[2] == columns
        got: Any = (
            DynamicSlidingWindowLayer(sliding_window=want.sliding_window) if compat.window_of(want) else DynamicLayer()
        )
        compat.fill(got, keys, values, columns)
        assert got.get_seq_length() == want.get_seq_length() == columns
        assert got.get_mask_sizes(3) == want.get_mask_sizes(3)
        assert got.is_initialized
        assert got.keys.device == want.keys.device
        assert lab.same_bits(got.keys, want.keys)
        assert lab.same_bits(got.values, want.values)


def test_chunks_that_left_the_window_are_stored_too() -> None:
    """Otherwise a prompt that diverges early could never hit."""
    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(100)
        lab.greedy(cached, ids)
        early = torch.cat([ids[:, :40], lab.prompt(20, seed=8)], 1)
        assert cached.hit_tokens(early[0]) == 32
        assert lab.greedy(cached, early).sequences.tolist() == lab.greedy(model, early).sequences.tolist()


def test_after_a_hit_only_what_was_computed_is_stored_for_the_window() -> None:
    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        first = lab.greedy(cached, lab.prompt(70))
        second = lab.greedy(cached, lab.continued(first, 30, seed=1))
        third = lab.continued(second, 9, seed=2)
        assert cached.hit_tokens(third) == 112
        got = lab.greedy(cached, third)
        assert got.sequences.tolist() == lab.greedy(model, third).sequences.tolist()


def test_recording_changes_nothing_in_what_a_layer_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    stock, recording = DynamicSlidingWindowLayer(sliding_window=6), compat.RecordingSlidingLayer(6)
    seen = []
    for columns in (9, 1, 1, 3, 1):
        kv = [torch.randn(2, 2, columns, 4, generator=generator) for _ in range(2)]
        seen.append(kv[0])
        for a, b in zip(stock.update(*kv), recording.update(*kv), strict=True):
            assert lab.same_bits(a, b)
        assert stock.get_mask_sizes(1) == recording.get_mask_sizes(1)
    assert lab.same_bits(recording.all_recorded()[0], torch.cat(seen, 2))
    bare = recording.stock()
    assert type(bare) is DynamicSlidingWindowLayer
    assert lab.same_bits(bare.keys, stock.keys)
    assert bare.cumulative_length == stock.cumulative_length
    assert not hasattr(bare, "recorded")


def test_a_cache_that_keeps_everything_does_not_suit_a_sliding_model() -> None:
    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        got = lab.greedy(cached, lab.prompt(70), past_key_values=DynamicCache())
        lab.assert_same(got, lab.greedy(model, lab.prompt(70), past_key_values=DynamicCache()))
        assert cached.stats()["uncached"] == {"past_key_values": 1}
