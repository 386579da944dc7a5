"""`CachedModel.generate` against the plain model: first rounds, hits, arguments, salts, changing weights."""

from __future__ import annotations

from typing import Any

import hflab as lab
import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmcache_hf import CachedModel
from lmcache_hf.weights import weights_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=list(lab.MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return lab.MODELS[request.param]()


# ------------------------------------------------------------------ first calls and hits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_call_gives_the_plain_models_tokens_and_logits(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    with CachedModel(model, lab.config()) as cached:
        lab.assert_same(lab.greedy(cached, lab.prompt(70)), lab.greedy(model, lab.prompt(70)))
        assert cached.stats()["uncached"] == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_round_of_a_chat_equals_recomputation_in_the_same_split(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    reference = lab.recorded_cache(model)
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for number in range(4):
            hit = cached.hit_tokens(ids)
            assert hit == 0 if number == 0 else hit >= (ids.shape[1] - 10) // lab.CHUNK * lab.CHUNK
            got = lab.greedy(cached, ids)
            expected = lab.greedy(model, ids, past_key_values=lab.cut(reference, hit))
            lab.assert_same(got, expected)
            ids = lab.continued(got, 9, seed=number)
        assert cached.stats()["hit_tokens"] > 0


def test_in_float32_tokens_equal_a_one_shot_run(model: Any) -> None:
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for number in range(3):
            got = lab.greedy(cached, ids)
            assert got.sequences.tolist() == lab.greedy(model, ids).sequences.tolist()
            ids = lab.continued(got, 9, seed=number)
        assert len(set(got.sequences[0, -12:].tolist())) > 3, "greedy output does not vary: nothing was shown"


def test_generated_tokens_are_stored_too() -> None:
    with CachedModel(lab.llama(), lab.config()) as cached:
        out = lab.greedy(cached, lab.prompt(20), new=40)
        assert (
            cached.hit_tokens(lab.continued(out, 4, seed=0)[0]) == 48
        )  # of 59 computed tokens; the last generated one has no KV
        assert cached.stats()["stored_tokens"] == 48


def test_the_last_prompt_token_is_always_computed() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(64)
        lab.greedy(cached, ids)
        assert cached.hit_tokens(ids[0]) == 48  # not 64
        got = lab.greedy(cached, ids)
        assert got.sequences.tolist() == lab.greedy(model, ids).sequences.tolist()


def test_a_prompt_shorter_than_a_chunk_is_just_a_miss() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        for columns in (1, 2, lab.CHUNK - 1):
            lab.assert_same(
                lab.greedy(cached, lab.prompt(columns), new=1), lab.greedy(model, lab.prompt(columns), new=1)
            )
        stats = cached.stats()
        assert stats["uncached"] == {}
        assert stats["hit_tokens"] == stats["stored_tokens"] == 0


def test_a_prompt_that_differs_early_does_not_hit() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        lab.greedy(cached, ids)
        other = ids.clone()
        other[0, 20] = 5
        assert cached.hit_tokens(other[0]) == lab.CHUNK
        assert lab.greedy(cached, other).sequences.tolist() == lab.greedy(model, other).sequences.tolist()


def test_what_a_hit_gives_is_what_was_stored_and_not_recomputed() -> None:
    """Poisoned KV must change the output; otherwise these tests would compare recomputation with itself."""
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        out = lab.greedy(cached, ids)
        assert cached.engine is not None
        for arena in cached.engine._rank.arenas:
            for slab in arena._slabs.values():
                slab.zero_()
        got = lab.greedy(cached, lab.continued(out, 9, seed=0))
        assert not lab.same_bits(got.logits[0], lab.greedy(model, lab.continued(out, 9, seed=0)).logits[0])


# ------------------------------------------------------------------ arguments


class Collector:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_streaming_hands_out_the_prompt_and_each_token_once() -> None:
    with CachedModel(lab.llama(), lab.config()) as cached:
        ids = lab.prompt(70)
        for _ in range(2):
            streamer = Collector()
            out = cached.generate(ids, max_new_tokens=8, do_sample=False, streamer=streamer)
            assert streamer.tokens == out[0].tolist()
            assert streamer.ended == 1
        assert cached.stats()["hit_tokens"] == 64


def test_sampling_with_a_seed_gives_the_plain_models_tokens_and_leaves_the_generator_alike() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for number in range(3):
            outs, after = [], []
            for runner in (model, cached):
                torch.manual_seed(100 + number)
                outs.append(runner.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.9, top_k=50))
                after.append(torch.rand(()).item())
            assert outs[0].tolist() == outs[1].tolist()
            assert after[0] == after[1]
            ids = torch.cat([outs[1], lab.prompt(9, seed=number)], 1)
        assert cached.stats()["hit_tokens"] > 64


def test_wrapping_a_model_leaves_the_random_generator_alone() -> None:
    model = lab.llama()
    torch.manual_seed(0)
    expected = torch.rand(()).item()
    torch.manual_seed(0)
    with CachedModel(model, lab.config()):
        assert torch.rand(()).item() == expected


def test_the_result_is_of_the_plain_models_kind() -> None:
    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for _ in range(2):
            assert isinstance(cached.generate(ids, max_new_tokens=3, do_sample=False), torch.Tensor)
            got = lab.greedy(cached, ids, new=3, output_scores=True)
            plain = lab.greedy(model, ids, new=3, output_scores=True)
            assert type(got) is type(plain)
            assert len(got.scores) == len(plain.scores)
            assert [type(x) for x in got.past_key_values.layers] == [type(x) for x in plain.past_key_values.layers]
            assert got.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def test_settings_may_come_by_position_by_object_or_from_the_model() -> None:
    model = lab.llama()
    model.generation_config.max_new_tokens = 5
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        assert cached.generate(ids).tolist() == model.generate(ids).tolist()
        settings = GenerationConfig(max_new_tokens=7, do_sample=False)
        assert cached.generate(ids, settings).tolist() == model.generate(ids, settings).tolist()
        assert cached.generate(inputs=ids, generation_config=settings).shape == (1, 77)
        assert cached.stats()["uncached"] == {}
        assert cached.stats()["hit_tokens"] == 128


def test_logits_processors_and_stopping_criteria_see_the_whole_sequence() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for _ in range(2):
            more: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
            assert (
                lab.greedy(cached, ids, **more).sequences.tolist() == lab.greedy(model, ids, **more).sequences.tolist()
            )
            end = int(lab.greedy(model, ids).sequences[0, 74])
            assert (
                lab.greedy(cached, ids, eos_token_id=end).sequences.tolist()
                == lab.greedy(model, ids, eos_token_id=end).sequences.tolist()
            )


# ------------------------------------------------------------------ the caller's own cache


@pytest.mark.parametrize("with_config", [True, False])
def test_a_callers_empty_cache_comes_back_full(with_config: bool) -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        for _ in range(2):
            mine = DynamicCache(config=model.config) if with_config else DynamicCache()
            out = lab.greedy(cached, ids, past_key_values=mine)
            assert out.past_key_values is mine
            assert mine.get_seq_length() == 81
            assert all(type(layer) is DynamicLayer for layer in mine.layers)
        plain = DynamicCache(config=model.config)
        lab.greedy(model, ids, past_key_values=plain)
        for got, want in zip(mine.layers, plain.layers, strict=True):
            torch.testing.assert_close(got.keys, want.keys, rtol=1e-4, atol=1e-4)
        more = lab.continued(out, 3, seed=1)
        got = lab.greedy(model, more, past_key_values=mine)  # and is still valid for the plain model
        assert got.sequences.tolist() == lab.greedy(model, more).sequences.tolist()
        assert cached.stats()["hit_tokens"] == 64


def test_a_callers_sliding_cache_comes_back_as_transformers_would_leave_it() -> None:
    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        lab.greedy(cached, lab.prompt(70))
        mine, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
        lab.greedy(cached, lab.prompt(70), past_key_values=mine)
        lab.greedy(model, lab.prompt(70), past_key_values=plain)
        for got, want in zip(mine.layers, plain.layers, strict=True):
            assert type(got) is type(want)
            assert got.keys.shape == want.keys.shape
            if isinstance(want, DynamicSlidingWindowLayer):
                assert got.cumulative_length == want.cumulative_length == 81
            torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ what keeps tenants and weights apart


def test_two_salts_never_share() -> None:
    with CachedModel(lab.llama(), lab.config()) as cached:
        ids = lab.prompt(70)
        lab.greedy(cached, ids, cache_salt="a")
        assert cached.hit_tokens(ids[0], cache_salt="a") == 64
        assert cached.hit_tokens(ids[0], cache_salt="b") == cached.hit_tokens(ids[0]) == 0
        lab.greedy(cached, ids, cache_salt="b")
        cached.clear(cache_salt="a")
        assert cached.hit_tokens(ids[0], cache_salt="a") == 0
        assert cached.hit_tokens(ids[0], cache_salt="b") == 64


def in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.add_(0.05)


def as_peft_merges(weight: torch.Tensor) -> None:
    weight.data += 0.05


def behind_the_version_counter(weight: torch.Tensor) -> None:
    weight.data.add_(0.05)


@pytest.mark.parametrize("change", [in_place, as_peft_merges, behind_the_version_counter])
def test_changed_weights_are_never_served_old_kv_and_restored_ones_hit_again(change: Any) -> None:
    model = lab.llama()
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        lab.greedy(cached, ids)
        change(weight)
        assert cached.hit_tokens(ids[0]) == 0
        lab.assert_same(lab.greedy(cached, ids), lab.greedy(model, ids))
        assert cached.hit_tokens(ids[0]) == 64
        with torch.no_grad():
            weight.copy_(before)
        assert cached.hit_tokens(ids[0]) == 64
        assert cached.engine is not None
        assert cached.engine.spec.model == CachedModel(lab.llama(), lab.config()).engine.spec.model  # type: ignore[union-attr]


def test_another_models_kv_is_not_found_in_the_same_folder(folder: Any) -> None:
    with CachedModel(lab.llama(seed=1), lab.config(disk_path=folder)) as cached:
        lab.greedy(cached, lab.prompt(70))
    with CachedModel(lab.llama(seed=2), lab.config(disk_path=folder)) as cached:
        assert cached.hit_tokens(lab.prompt(70)[0]) == 0
    with CachedModel(lab.llama(seed=1), lab.config(disk_path=folder)) as cached:
        assert cached.hit_tokens(lab.prompt(70)[0]) == 64


def test_a_hook_that_steers_inside_the_model_gets_a_name_of_its_own() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        lab.greedy(cached, ids)
        handle = model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.1)
        assert cached.hit_tokens(ids[0]) == 0
        lab.assert_same(lab.greedy(cached, ids), lab.greedy(model, ids))
        handle.remove()
        assert cached.hit_tokens(ids[0]) == 64
        model.register_forward_hook(lambda module, args, out: None)  # does not affect keys or values
        assert cached.hit_tokens(ids[0]) == 64


def test_another_dtype_or_attention_backend_starts_afresh() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        ids = lab.prompt(70)
        lab.greedy(cached, ids)
        assert cached.to(torch.bfloat16) is cached
        assert cached.hit_tokens(ids[0]) == 0
        lab.assert_same(lab.greedy(cached, ids), lab.greedy(model, ids))
        assert cached.hit_tokens(ids[0]) == 64
        model.set_attn_implementation("eager")
        assert cached.hit_tokens(ids[0]) == 0
        lab.assert_same(lab.greedy(cached, ids), lab.greedy(model, ids))
        assert cached.stats()["uncached"] == {}


# ------------------------------------------------------------------ the wrapper itself


def test_everything_else_is_the_models() -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        assert cached.config is model.config
        assert cached.cache_config.chunk_tokens == lab.CHUNK
        assert cached.device == model.device
        assert cached.generation_config is model.generation_config
        assert cached.eval() is cached
        assert torch.equal(cached(lab.prompt(5)).logits, model(lab.prompt(5)).logits)
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = cached.no_such_thing


def test_after_close_it_still_answers() -> None:
    model = lab.llama()
    cached = CachedModel(model, lab.config())
    lab.greedy(cached, lab.prompt(70))
    cached.close()
    cached.close()
    lab.assert_same(lab.greedy(cached, lab.prompt(70)), lab.greedy(model, lab.prompt(70)))
    assert cached.stats()["uncached"] == {"closed": 1}


def test_weights_are_read_in_full_only_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.llama()
    with CachedModel(model, lab.config()) as cached:
        read: list[int] = []
        monkeypatch.setattr("lmcache_hf.model.weights_digest", lambda model: read.append(1) or weights_digest(model))
        for _ in range(3):
            lab.greedy(cached, lab.prompt(40))
        assert read == []
        in_place(model.lm_head.weight)
        for _ in range(3):
            lab.greedy(cached, lab.prompt(40))
        assert read == [1]
