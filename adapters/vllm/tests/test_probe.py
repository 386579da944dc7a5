"""How vLLM rounds is measured with vLLM's own layers. (Real engines: `test_reset`.)"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear

from lmcache_conformance.labs.models import model_folder
from lmcache_vllm.probe import probe

NO_GROUPS: Any = SimpleNamespace(kv_cache_groups=[])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def config(request: pytest.FixtureRequest) -> Any:
    arguments = {"dtype": request.param, "enforce_eager": True, "max_model_len": 512, "skip_tokenizer_init": True}
    return EngineArgs(model=str(model_folder("llama")), **arguments).create_engine_config()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group is set up here."""
    for name, value in (("rank", 0), ("world_size", 1)):
        monkeypatch.setattr(
            f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}", lambda value=value: value
        )


def measure(config: Any) -> tuple[dict[str, str], str]:
    bits, left_out = probe(config, NO_GROUPS, {}, torch.device("cpu"))
    return dict(bits), left_out


def test_the_same_arithmetic_gives_the_same_digest_whatever_the_random_state(config: Any) -> None:
    torch.manual_seed(1)
    first = measure(config)
    torch.manual_seed(2)
    assert measure(config) == first
    assert len(first[0]["measured matmul"]) == 32


def test_a_matmul_that_adds_in_another_order_has_another_digest(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = measure(config)[0]
    plain = linear.UnquantizedLinearMethod.process_weights_after_loading

    def split(self: Any, layer: Any) -> None:
        weight, half = layer.weight.data.clone(), layer.weight.shape[1] // 2
        plain(self, layer)
        layer.cpu_linear = lambda x, _, bias: (
            torch.nn.functional.linear(x[:, half:], weight[:, half:])
            + torch.nn.functional.linear(x[:, :half], weight[:, :half])
        )

    monkeypatch.setattr(linear.UnquantizedLinearMethod, "process_weights_after_loading", split)
    after = measure(config)[0]
    assert after["measured matmul"] != before["measured matmul"]


def test_what_differs_between_two_runs_is_left_out_and_named(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear.UnquantizedLinearMethod.apply
    monkeypatch.setattr(linear.UnquantizedLinearMethod, "apply", lambda *args: plain(*args) + torch.rand(()))
    assert measure(config) == ({}, "matmul: two runs gave different bits")


def test_what_cannot_be_run_is_left_out_and_named(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(linear, "UnquantizedLinearMethod")
    bits, left_out = measure(config)
    assert bits == {}
    assert left_out.startswith("matmul: ImportError")
