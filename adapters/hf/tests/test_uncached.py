"""What cannot be cached runs as if unwrapped: same output, with the reason counted and logged once."""

from __future__ import annotations

import logging
from typing import Any

import hflab as lab
import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

from lmcache.errors import LMCacheError
from lmcache_conformance.labs.models import COMMON, randomised
from lmcache_hf import CachedModel, UncachedError


@pytest.fixture(scope="module")
def llama() -> Any:
    return lab.llama()


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "beams": ("beams", {"num_beams": 2}),
    "several sequences": ("return_sequences", {"num_return_sequences": 2, "do_sample": True, "seed": 1}),
    "prompt lookup": ("assisted", {"prompt_lookup_num_tokens": 3}),
    "static cache": ("cache_implementation", {"cache_implementation": "static"}),
    "no cache": ("use_cache", {"use_cache": False}),
    "chunked prefill": ("prefill_chunk_size", {"prefill_chunk_size": 32}),
    "hidden states": ("hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    "attentions": ("hidden_states", {"output_attentions": True, "return_dict_in_generate": True}),
    "positions": ("position_ids", {"position_ids": torch.arange(70)[None] + 3}),
    "own decoding loop": ("custom_generate", {"custom_generate": type(lab.llama())._sample}),
}


def tokens_of(out: Any) -> list[list[int]]:
    found: list[list[int]] = (out if isinstance(out, torch.Tensor) else out.sequences).tolist()
    return found


def run(model: Any, arguments: dict[str, Any]) -> Any:
    arguments = {"max_new_tokens": 6, "do_sample": False, **arguments}
    torch.manual_seed(arguments.pop("seed", 0))
    return model.generate(**arguments)


@pytest.mark.parametrize("name", list(CALLS))
def test_the_call_runs_uncached_with_its_reason(name: str, llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    reason, arguments = CALLS[name]
    arguments = {"input_ids": lab.prompt(70), **arguments}
    with CachedModel(llama, lab.config()) as cached, caplog.at_level(logging.WARNING, "lmcache"):
        lab.greedy(cached, lab.prompt(70))  # so that a hit would be possible
        for _ in range(2):
            assert tokens_of(run(cached, arguments)) == tokens_of(run(llama, arguments))
        stats = cached.stats()
        assert stats["uncached"] == {reason: 2}
        assert stats["hit_tokens"] == 0
        assert stats["engine"][f'lmcache_uncached_requests_total{{reason="{reason}"}}'] == 2
    assert len([r for r in caplog.records if "hf-uncached" in r.getMessage()]) == 1


def test_assistants_run_uncached(llama: Any) -> None:
    with CachedModel(llama, lab.config()) as cached:
        arguments = {"input_ids": lab.prompt(70), "assistant_model": lab.llama(seed=2, layers=1)}
        assert tokens_of(run(cached, arguments)) == tokens_of(run(llama, arguments))
        assert cached.stats()["uncached"] == {"assisted": 1}


def test_embeddings_run_uncached(llama: Any) -> None:
    with CachedModel(llama, lab.config()) as cached:
        arguments = {"inputs_embeds": llama.get_input_embeddings()(lab.prompt(70)).detach()}
        assert tokens_of(run(cached, arguments)) == tokens_of(run(llama, arguments))
        assert cached.stats()["uncached"] == {"inputs_embeds": 1}


def test_a_callers_filled_or_special_cache_runs_uncached(llama: Any) -> None:
    def filled() -> DynamicCache:
        cache = DynamicCache(config=llama.config)
        llama(lab.prompt(70)[:, :30], past_key_values=cache)
        return cache

    with CachedModel(llama, lab.config()) as cached:
        lab.greedy(cached, lab.prompt(70))
        for make in (filled, lambda: StaticCache(config=llama.config, max_cache_len=100)):
            mine, other = make(), make()
            got = run(cached, {"input_ids": lab.prompt(70), "past_key_values": mine})
            assert tokens_of(got) == tokens_of(run(llama, {"input_ids": lab.prompt(70), "past_key_values": other}))
            assert mine.get_seq_length() == other.get_seq_length()
        assert cached.stats()["uncached"] == {"past_key_values": 2}


def test_no_prompt_at_all_runs_uncached(llama: Any) -> None:
    with CachedModel(llama, lab.config()) as cached:
        assert tokens_of(run(cached, {})) == tokens_of(run(llama, {}))
        assert cached.stats()["uncached"] == {"no_tokens": 1}


def test_training_mode_runs_uncached_until_eval() -> None:
    model = lab.llama().train()
    with CachedModel(model, lab.config()) as cached:
        lab.greedy(cached, lab.prompt(70))
        assert cached.stats()["uncached"] == {"training": 1}
        assert cached.engine is None
        model.eval()
        lab.greedy(cached, lab.prompt(70))
        assert cached.hit_tokens(lab.prompt(70)[0]) == 64


def test_autocast_runs_uncached(llama: Any) -> None:
    with CachedModel(llama, lab.config()) as cached, torch.autocast("cpu", torch.bfloat16):
        got = lab.greedy(cached, lab.prompt(70))
        lab.assert_same(got, lab.greedy(llama, lab.prompt(70)))
        assert cached.stats()["uncached"] == {"autocast": 1}


def test_image_inputs_run_uncached_and_reach_the_model(llama: Any) -> None:
    with CachedModel(llama, lab.config()) as cached:
        for name, reason in (
            ("pixel_values", "multimodal"),
            ("input_features", "multimodal"),
            ("task", "model_inputs"),
        ):
            with pytest.raises(ValueError, match="not used by the model"):  # the model's own message
                run(cached, {"input_ids": lab.prompt(70), name: torch.ones(1)})
            assert cached.stats()["uncached"][reason] >= 1


def test_text_that_comes_with_zero_token_types_is_cached() -> None:
    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        calls = []
        model.forward, forward = (
            lambda *a, token_type_ids=None, **k: (calls.append(1), forward(*a, **k))[1],
            model.forward,
        )
        run(cached, {"input_ids": lab.prompt(70), "token_type_ids": torch.zeros(1, 70, dtype=torch.int64)})
        assert calls
        assert cached.stats()["uncached"] == {}
        run(cached, {"input_ids": lab.prompt(70), "token_type_ids": torch.ones(1, 70, dtype=torch.int64)})
        assert cached.stats()["uncached"] == {"model_inputs": 1}


# ------------------------------------------------------------------ whole models


def t5() -> Any:
    config = T5Config(
        vocab_size=lab.VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return randomised(T5ForConditionalGeneration(config))


def mamba() -> Any:
    return randomised(MambaForCausalLM(MambaConfig(vocab_size=lab.VOCAB, hidden_size=64, num_hidden_layers=2)))


def dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(**{**COMMON, "max_position_embeddings": 64}, num_hidden_layers=2, rope_parameters=rope)
    return randomised(LlamaForCausalLM(config))


class OwnGenerate(LlamaForCausalLM):
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)


def own_generate() -> Any:
    return randomised(OwnGenerate(LlamaConfig(**COMMON, num_hidden_layers=2)))


def bidirectional() -> Any:
    return lab.gemma(use_bidirectional_attention=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (t5, "encoder_decoder"),
        (mamba, "unsupported_cache"),
        (dynamic_rope, "rope"),
        (own_generate, "custom_generate"),
        (bidirectional, "unproven"),
    ],
)
def test_a_model_that_cannot_be_cached_runs_as_it_is(make: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.WARNING, "lmcache"), CachedModel(model, lab.config()) as cached:
        for _ in range(2):
            arguments = {"input_ids": lab.prompt(40)}
            assert tokens_of(run(cached, arguments)) == tokens_of(run(model, arguments))
        assert cached.stats()["uncached"] == {reason: 2}
        assert cached.hit_tokens(lab.prompt(40)[0]) == 0
        cached.flush()
        cached.clear()
    assert len([r for r in caplog.records if "hf-uncached" in r.getMessage()]) == 1
    with pytest.raises(UncachedError, match=type(model).__name__):
        CachedModel(model, lab.config(strict=True))


def test_what_is_not_a_transformers_model_is_passed_through() -> None:
    class Echo:
        training = False

        def generate(self, text: str) -> str:
            return text

    with CachedModel(Echo(), lab.config()) as cached:
        assert cached.generate("hello") == "hello"
        assert sum(cached.stats()["uncached"].values()) == 1


def test_strict_raises_instead_of_running_uncached(llama: Any) -> None:
    with CachedModel(llama, lab.config(strict=True)) as cached:
        lab.greedy(cached, lab.prompt(70))
        with pytest.raises(UncachedError, match="2 beams"):
            run(cached, {"input_ids": lab.prompt(70), "num_beams": 2})
        assert issubclass(UncachedError, LMCacheError)


# ------------------------------------------------------------------ failures


class Boom(StoppingCriteria):
    """Fails once, so that a hidden retry would succeed and be detected."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("the caller's own failure")
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def test_failures_of_the_model_or_the_caller_are_not_swallowed(llama: Any) -> None:
    with CachedModel(llama, lab.config()) as cached:
        mine = DynamicCache(config=llama.config)
        with pytest.raises(RuntimeError, match="the caller's own failure"):
            lab.greedy(cached, lab.prompt(70), stopping_criteria=[Boom()], past_key_values=mine)
        assert cached.hit_tokens(lab.prompt(70)[0]) == 0
        with pytest.raises(TypeError):
            cached.generate(lab.prompt(70), None, None, None, None, None, None, None, None, None, None, "one too many")
        lab.assert_same(lab.greedy(cached, lab.prompt(70)), lab.greedy(llama, lab.prompt(70)))


@pytest.mark.parametrize("where", ["lookup", "retrieve", "store"])
def test_a_defect_in_the_cache_costs_a_miss_and_no_answer(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a defect")

    model = lab.gemma()
    with CachedModel(model, lab.config()) as cached:
        out = lab.greedy(cached, lab.prompt(70))
        monkeypatch.setattr(cached.engine, where, broken)
        more = lab.continued(out, 9, seed=1)
        mine, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
        got = lab.greedy(cached, more, past_key_values=mine)
        assert tokens_of(got) == tokens_of(lab.greedy(model, more, past_key_values=plain))
        assert mine.get_seq_length() == more.shape[1] + 11
        assert [type(layer) for layer in mine.layers] == [type(layer) for layer in plain.layers]
        stats = cached.stats()
        assert stats["store_errors"] + stats["uncached"].get("error", 0) == 1
