"""A name covers everything that decides KV: a model that computes other KV never has the same name."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hflab as lab
import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lmcache.keys import namespace_of
from lmcache.numerics import NEUTRAL_CONFIG
from lmcache_hf import CachedModel, UncachedError, compat, geometry
from lmcache_hf.weights import weights_digest

pytestmark = pytest.mark.usefixtures("one_thread")


def name_of(model: Any, **settings: Any) -> bytes:
    """The namespace under which a model's KV would be stored."""
    with CachedModel(model, lab.config(strict=True, **settings)) as cached:
        assert cached.engine is not None
        return namespace_of(cached.engine.spec, chunk_tokens=lab.CHUNK, share=cached.cache_config.share)


# ------------------------------------------------------------------ the configuration

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def with_config(**changes: Any) -> Any:
    """A llama whose weights do not depend on its configuration, where their shapes allow."""
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.2
    return model


def mutations(name: str, value: Any) -> list[Any]:
    """Other values of a field."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2] if value else [1, 5]
    if isinstance(value, float):
        return [value * 2 if value else 0.5, value + 1e-3]
    if name == "hidden_act":
        return ["gelu", "relu"]
    if name == "rope_parameters":
        linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        return [
            {"rope_type": "default", "rope_theta": 5e5},
            linear,
            linear | {"factor": 2.0},
            linear | {"rope_type": "yarn", "original_max_position_embeddings": 64},
            linear | {"rope_type": "llama3", **llama3},
        ]
    if isinstance(value, str):
        return [value + "x"]
    return [7, "x"]


@torch.no_grad()
def kv_of(model: Any) -> list[torch.Tensor]:
    cache = DynamicCache(config=model.config)
    model(torch.arange(3, 51)[None], past_key_values=cache)
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def test_every_field_of_the_configuration_is_named_or_changes_no_bit() -> None:
    """The sweep: each field of a tiny llama's configuration, mutated, with the weights under one `model_identity`."""
    settings = {"model_identity": "mine", "share": "semantic"}
    base = with_config()
    name, kv = name_of(base, **settings), kv_of(base)
    loaded = separated = equal = changed = 0
    for field, value in sorted({**base.config.to_dict(), "a_field_of_tomorrow": 0}.items()):
        for other in mutations(field, value):
            try:
                model = with_config(**{field: other})
                got = kv_of(model)
            except Exception:
                continue  # such a model does not load or does not run
            if model.config.to_dict() == base.config.to_dict():
                continue  # a constant of the class, such as `model_type`
            loaded += 1
            try:
                found = name_of(model, **settings)
            except UncachedError:
                found = b""  # nothing is cached, with a reason
            if found != name:
                separated += 1
            else:
                assert len(got) == len(kv), field
                assert all(lab.same_bits(a, b) for a, b in zip(got, kv, strict=True)), f"{field}={other!r}: one name"
                reviewed = {*NEUTRAL_CONFIG, "architectures"}  # the class that computes is named instead
                assert field in reviewed, f"{field}={other!r} does not separate"
                equal += 1
            changed += len(got) != len(kv) or not all(
                a.shape == b.shape and a.equal(b) for a, b in zip(got, kv, strict=True)
            )
    print(
        f"\n{loaded} mutated configurations load: {separated} have another name or none, {equal} equal KV; {changed} change KV"
    )
    assert loaded >= 40
    assert changed >= 12
    assert separated >= changed


def test_a_configuration_changed_after_loading_is_named_too() -> None:
    model = lab.gemma()
    before = name_of(model, model_identity="mine", share="semantic")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0}
    assert name_of(model, model_identity="mine", share="semantic") != before


def test_a_running_cache_notices_a_changed_configuration() -> None:
    model = lab.llama()
    ids = lab.prompt(70)
    with CachedModel(model, lab.config()) as cached:
        lab.greedy(cached, ids)
        assert cached.hit_tokens(ids[0]) > 0
        model.config.rms_norm_eps = 0.5
        assert cached.hit_tokens(ids[0]) == 0


def test_an_identity_replaces_the_weights_and_nothing_else() -> None:
    one, other = with_config(), with_config()
    other.model.layers[0].self_attn.k_proj.weight.data *= -1
    assert name_of(one) != name_of(other)
    same = {"model_identity": "mine", "share": "semantic"}
    assert name_of(one, **same) == name_of(other, **same)
    handle = other.model.layers[0].register_forward_hook(lambda *_: None)
    assert name_of(one, **same) != name_of(other, **same)
    handle.remove()
    assert name_of(one, **same) == name_of(other, **same)


def test_semantic_sharing_drops_rounding_only() -> None:
    model, exact = with_config(), name_of(with_config())
    model.set_attn_implementation("eager")
    assert name_of(model) != exact
    assert name_of(model, share="semantic") == name_of(with_config(), share="semantic")
    bf16 = with_config().to(torch.bfloat16)
    assert name_of(bf16, share="semantic", model_identity="m") != name_of(model, share="semantic", model_identity="m")


def test_rows_that_change_places_change_the_digest() -> None:
    one, other = with_config(), with_config()
    weight = other.model.layers[1].self_attn.v_proj.weight.data
    weight[[3, 4]] = weight[[4, 3]]
    assert weights_digest(one) != weights_digest(other)


# ------------------------------------------------------------------ rounding


@contextmanager
def switched(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    old = read()
    write(value)
    try:
        yield
    finally:
        write(old)


SWITCHES = {
    "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    "mkldnn": (
        lambda: torch.backends.mkldnn.enabled,
        lambda on: setattr(torch.backends.mkldnn, "enabled", on),
        False,
    ),
    "threads": (torch.get_num_threads, torch.set_num_threads, 2),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_that_may_change_bits_separates_at_once(switch: str) -> None:
    ids = lab.prompt(70)
    with CachedModel(lab.llama(), lab.config()) as cached:
        lab.greedy(cached, ids)
        assert cached.hit_tokens(ids[0]) > 0
        with switched(*SWITCHES[switch]):
            assert cached.hit_tokens(ids[0]) == 0


def test_an_environment_variable_separates(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name_of(with_config())
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert name_of(with_config()) != before


def test_bits_are_measured_at_start_up() -> None:
    def steered(factor: float) -> Any:
        """Stands for a kernel that rounds differently: nothing else tells the two apart."""
        model = with_config()
        plain = model.model.layers[0].self_attn.k_proj.forward
        model.model.layers[0].self_attn.k_proj.forward = lambda x: plain(x) * factor
        return model

    assert name_of(steered(1.0)) == name_of(with_config())
    assert name_of(steered(1 + 2**-20)) != name_of(with_config())
    assert name_of(steered(1 + 2**-20), share="semantic") == name_of(with_config(), share="semantic")


def test_an_unsteady_probe_is_left_out_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(geometry, "measured", lambda run: "")
    with caplog.at_level("WARNING", "lmcache"), CachedModel(lab.llama(), lab.config()) as cached:
        assert cached.engine is not None
        assert "probe" not in dict(cached.engine.spec.numerics.extra)
    assert caplog.text.count("hf-probe-left-out") == 1
    assert "two runs gave different bits" in caplog.text


def test_torchs_new_interface_for_precision_is_no_reason_to_run_uncached() -> None:
    """In a process of its own: mixing both interfaces makes torch's old getter raise."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, hflab as lab\nfrom lmcache_hf import CachedModel\n"
        "torch.backends.fp32_precision = 'ieee'\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "with CachedModel(lab.llama(), lab.config(strict=True)) as cached:\n"
        "    lab.greedy(cached, lab.prompt(70)); assert cached.hit_tokens(lab.prompt(70)[0]) == 64, cached.stats()\n"
    )
    folder = __file__.rpartition("/")[0]
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-800:]


# ------------------------------------------------------------------ models that keep positions


def test_a_model_that_keeps_rope_deltas_runs_uncached() -> None:
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    ids = torch.arange(3, 60)[None]
    with CachedModel(model, lab.config()) as cached:
        cached.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        assert cached.stats()["uncached"] == {"rope": 1}
        assert cached.hit_tokens(ids[0]) == 0


# ------------------------------------------------------------------ the world around a wrapped model


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_with_advice(how: Callable[[Any], Any]) -> None:
    with CachedModel(lab.llama(), lab.config()) as cached, pytest.raises(TypeError, match="wrap that in another"):
        how(cached)


def test_another_default_device_changes_nothing() -> None:
    ids = lab.prompt(70)
    mask = torch.ones_like(ids)
    with CachedModel(lab.llama(), lab.config()) as cached:
        torch.set_default_device("meta")  # stands for a GPU
        try:
            for _ in range(2):
                cached.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
            assert cached.hit_tokens(ids[0]) == 64
        finally:
            torch.set_default_device(None)
        assert cached.stats()["hit_tokens"] == 64
        assert cached.stats()["uncached"] == {}


def test_a_wrapped_model_can_assist() -> None:
    model, ids = lab.llama(), lab.prompt(40)
    with CachedModel(lab.llama(layers=2), lab.config()) as cached:
        more = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        got = model.generate(ids, assistant_model=cached, **more)
        assert torch.equal(got, model.generate(ids, assistant_model=cached.model, **more))


def test_the_name_of_the_caches_argument_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 renames `past_key_values` to `cache`; an unknown `cache` is refused by the model itself."""
    model, ids = lab.llama(), lab.prompt(70)
    renamed = "cache" in inspect.signature(model.forward).parameters
    assert compat.cache_names(model) == (("cache",) if renamed else ("past_key_values",))
    with CachedModel(model, lab.config()) as cached:
        if not renamed:
            with pytest.raises(ValueError, match="not used by the model"):
                cached.generate(ids, cache=DynamicCache(config=model.config))
            assert cached.stats()["uncached"] == {"model_inputs": 1}
        monkeypatch.setattr(compat, "cache_names", lambda model: ("cache",))
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(type(model), "generate", lambda self, **given: seen.append(given))
        monkeypatch.setattr(cached, "_keep", lambda *_: None)
        mine = DynamicCache(config=model.config)
        monkeypatch.setattr(
            compat,
            "read_call",
            lambda *_: compat.Call(
                {"input_ids": ids, "cache": mine}, model.generation_config, {"input_ids": ids, "cache": mine}
            ),
        )
        cached.generate(input_ids=ids, cache=mine)
        monkeypatch.setattr(
            compat, "read_call", lambda *_: compat.Call({"input_ids": ids}, model.generation_config, {"input_ids": ids})
        )
        cached.generate(input_ids=ids)
        assert [set(given) for given in seen] == [{"input_ids", "cache"}] * 2
        assert seen[0]["cache"] is mine
