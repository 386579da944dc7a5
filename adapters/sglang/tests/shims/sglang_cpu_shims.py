"""An SGLang plugin that makes its caches work without a GPU: torch versions of the CUDA copies that host pools use, and fixes
for attention backends on CPUs. Test-only.

SGLang calls `install` at start-up in each of its processes (entry point group `sglang.srt.plugins`, found through the
`.dist-info` folder next to this file when this folder is on PYTHONPATH). Indices are token slots, whole pages in order.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch


def transfer_kv_direct(
    src_layers: Any, dst_layers: Any, src_indices: torch.Tensor, dst_indices: torch.Tensor, page_size: int
) -> None:
    """Copies token rows between lists of per-layer tensors `(slots, …)`."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices].view(target.shape[1:] and (-1, *target.shape[1:]))


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Any, dst_ptrs: Any, src_indices: torch.Tensor, dst_indices: torch.Tensor, layer_id: int, page_size: int
) -> None:
    """Copies one layer from host pages `(pages, layers, slot, …)` to device rows `(slots, …)`."""
    pages = src_indices.view(-1, page_size)[:, 0] // page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].reshape(len(dst_indices), *target.shape[1:])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Any, dst_ptrs: Any, src_indices: torch.Tensor, dst_indices: torch.Tensor, page_size: int
) -> None:
    """Copies all layers from device rows to host pages; `src_ptrs` lists the layers of each of `dst_ptrs` in turn."""
    pages = dst_indices.view(-1, page_size)[:, 0] // page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, target in enumerate(dst_ptrs):
        for layer, source in enumerate(src_ptrs[number * layers : (number + 1) * layers]):
            target[pages, layer] = source[src_indices].reshape(len(pages), page_size, *target.shape[3:])


def plain_allocation(dims: Any, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
    """Allocates host memory that is not pinned."""
    return torch.zeros(dims, dtype=dtype, device=device)


def set_mla_kv_buffer(pool: torch.Tensor, slots: torch.Tensor, nope: torch.Tensor, rope: torch.Tensor) -> None:
    """Writes latents and rotary keys, side by side, into rows of an MLA pool."""
    width = nope.shape[-1]
    rows = pool.view(pool.shape[0], -1)
    rows[slots, :width] = nope.reshape(len(slots), -1).to(pool.dtype)
    rows[slots, width : width + rope.shape[-1]] = rope.reshape(len(slots), -1).to(pool.dtype)


def install() -> None:
    """Replaces functions that need CUDA in the modules that import them by name."""
    from sglang.srt.mem_cache.pool_host import common, mha, mla

    for module in (mha, mla):
        for function in (transfer_kv_direct, transfer_kv_per_layer_direct_pf_lf, transfer_kv_all_layer_direct_lf_pf):
            setattr(module, function.__name__, function)
    common.ALLOC_MEMORY_FUNCS["cpu"] = plain_allocation
    for host in (mha.MHATokenToKVPoolHost, mla.MLATokenToKVPoolHost):
        plain = host.__init__

        def unpinned(self: Any, *args: Any, _plain: Any = plain, **named: Any) -> None:
            _plain(self, *args, **{**named, "pin_memory": False})

        host.__init__ = unpinned
    _serve_latent_attention()
    _serve_sliding_windows()


def _serve_latent_attention() -> None:
    """Enables MLA with `torch_native`: registers its attention method for DeepSeek, and replaces a Triton kernel."""
    from sglang.srt.models import deepseek_v2
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    rope = deepseek_v2.get_rope_wrapper  # on CPUs it only supports scaled positions

    def any_rope(*arguments: Any, rope_scaling: Any = None, device: Any = None, **named: Any) -> Any:
        return rope(*arguments, rope_scaling=rope_scaling, device=device if rope_scaling else None, **named)

    deepseek_v2.get_rope_wrapper = any_rope
    absorbed = handlers.AttnForwardMethod.MLA
    handlers.AttentionBackendRegistry.register("torch_native", lambda attention, batch: absorbed)
    for module in list(sys.modules.values()):
        if module is not None and vars(module).get("set_mla_kv_buffer_triton") is not None:
            module.set_mla_kv_buffer_triton = set_mla_kv_buffer  # type: ignore[attr-defined]


def _serve_sliding_windows() -> None:
    """Fixes `torch_native` for sliding layers with their own pool: it writes at that pool's slots but reads at those of full
    attention's pool, which only works while both pools allocate the same slots, so not after an eviction."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    for name in ("forward_extend", "forward_decode"):
        plain = getattr(TorchNativeAttnBackend, name)

        def forward(
            self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, _plain: Any = plain, **named: Any
        ) -> Any:
            requests, pool = self.req_to_token_pool, self.token_to_kv_pool
            if self.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]:
                slots = pool.translate_loc_from_full_to_swa(requests.req_to_token.to(torch.int64))
                self.req_to_token_pool = SimpleNamespace(req_to_token=slots)
            try:
                return _plain(self, q, k, v, layer, *args, **named)
            finally:
                self.req_to_token_pool = requests

        setattr(TorchNativeAttnBackend, name, forward)
