"""Measures how this worker rounds: vLLM's own matmul and attention on fixed inputs, in the model's dtype and sizes.

It covers what no switch tells: kernels, libraries, processors. The attention of GPU backends needs a forward pass's metadata and
workspace, and is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lmcache.adapter import describe
from lmcache.numerics import fixed_input, measured
from lmcache_vllm.geometry import layer_order

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_ROWS = (1, 16, 160)
"""Tokens in one matmul: libraries choose kernels by size."""

_DEPTH, _WIDTH = 8192, 512
"""Largest inner and outer size of a matmul: the inner one decides the order of additions."""

_CACHED, _NEW = 40, 24
"""Tokens in the KV cache before a pass, and in it."""


def probe(
    config: VllmConfig, kv_config: KVCacheConfig, layers: Mapping[str, Any], device: torch.device
) -> tuple[tuple[tuple[str, str], ...], str]:
    """Returns (name, digest of the bits) of each part, and why parts were left out: two runs differ, or they cannot be run."""
    found, left_out = [], []
    parts: dict[str, Callable[[], list[Callable[[], Iterable[torch.Tensor]]]]] = {
        "matmul": lambda: [_Matmul(config, device)],
    }
    if device.type == "cpu" and kv_config.kv_cache_groups:
        parts["attention"] = lambda: [_Attention(config, group, layers) for group in kv_config.kv_cache_groups]
    for name, prepare in parts.items():
        try:
            runs = prepare()
            bits = measured(lambda runs=runs: [result for run in runs for result in run()])  # type: ignore[misc]
        except Exception as error:
            left_out.append(f"{name}: {describe(error)}")
            continue
        if bits:
            found.append((f"measured {name}", bits))
        else:
            left_out.append(f"{name}: two runs gave different bits")
    return tuple(found), "; ".join(left_out)


class _Matmul:
    """A linear layer without quantisation, with random weights, prepared as vLLM prepares the model's."""

    def __init__(self, config: VllmConfig, device: torch.device) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        dtype = config.model_config.dtype
        depth = min(int(config.model_config.get_hidden_size()), _DEPTH)
        with set_current_vllm_config(config):
            self._method = UnquantizedLinearMethod()
            self._layer = torch.nn.Module()
            self._method.create_weights(
                self._layer, depth, [_WIDTH], depth, _WIDTH, dtype, weight_loader=lambda *_: None
            )
            self._layer.weight = torch.nn.Parameter(fixed_input((_WIDTH, depth), dtype, device), requires_grad=False)
            self._method.process_weights_after_loading(self._layer)
        self._inputs = [fixed_input((rows, depth), dtype, device) for rows in _ROWS]

    @torch.no_grad()
    def __call__(self) -> Iterable[torch.Tensor]:
        return [self._method.apply(self._layer, given) for given in self._inputs]


class _Attention:
    """The attention of one group's first layer, over a KV cache of its own that its own write path has filled."""

    def __init__(self, config: VllmConfig, group: Any, layers: Mapping[str, Any]) -> None:
        from vllm.config import set_current_vllm_config

        name = layer_order(group)[0]
        self._layer, self._spec = layers[name], group.kv_cache_spec
        self._dtype = config.model_config.dtype
        device = torch.device("cpu")
        with set_current_vllm_config(config):
            make = self._layer.get_attn_backend().get_builder_cls()
            self._builder = make(self._spec, [name], config, device)

    @torch.no_grad()
    def __call__(self) -> Iterable[torch.Tensor]:
        spec, impl, tokens = self._spec, self._layer.impl, _CACHED + _NEW
        heads, size, block = int(spec.num_kv_heads), int(spec.head_size), int(spec.block_size)
        blocks = -(-tokens // block)
        cache = torch.zeros(blocks, heads, block, 2 * size, dtype=spec.dtype)
        keys, values = (fixed_input((2, tokens, heads, size), self._dtype, "cpu")[i].contiguous() for i in (0, 1))
        impl.do_kv_cache_update(self._layer, keys, values, cache, torch.arange(tokens))
        found = []
        for new in (_NEW, 1):  # a prompt's rest, and one token of an answer
            query = fixed_input((new, int(impl.num_heads), size), self._dtype, "cpu")
            meta = self._builder.build(0, _one_request(new, tokens, blocks))
            output = torch.zeros_like(query)
            impl.forward(self._layer, query, keys[-new:], values[-new:], cache, meta, output)
            found.append(output)
        return found


def _one_request(new: int, tokens: int, blocks: int) -> Any:
    """The parts of vLLM's `CommonAttentionMetadata` that the CPU backend reads."""
    return SimpleNamespace(
        num_reqs=1,
        num_actual_tokens=new,
        max_query_len=new,
        max_seq_len=tokens,
        query_start_loc=torch.tensor([0, new], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        block_table_tensor=torch.arange(blocks, dtype=torch.int32)[None],
        slot_mapping=torch.arange(tokens - new, tokens),
        causal=True,
    )
