"""Describes SGLang's device KV pool as a `KVSpec` and a layout, and proves the layout.

Two kinds of pool are supported, with one tensor per layer: keys and values `(slots, heads, dim)`, or MLA latents
`(slots, 1, dim)`. The layer group and its planes are named as for the other engines, so that equal KV has equal keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lmcache.adapter import UnsupportedError
from lmcache.errors import LMCacheError
from lmcache.layout import Layout, PagedKV
from lmcache.layout.proof import Proof, Values, prove
from lmcache.spec import KVSpec, LayerGroup, Numerics, Plane, Rect, dtype_name
from lmcache_sglang.pools import SCRATCH_PAGES, Rank

MHA, MLA = "MHATokenToKVPool", "MLATokenToKVPool"
_LEAST_SLOTS = 4
"""Minimum number of slots for the layout proof."""


class DevicePool:
    """The device pool of one rank.

    Args:
        pool: SGLang's pool.
        page_tokens: slots per page.
        model, numerics, meaning: as in `KVSpec`.
        rank: the rank that owns the pool.

    Raises:
        UnsupportedError: the pool is of another kind, or its layout differs from what its kind implies.
    """

    def __init__(
        self, pool: Any, page_tokens: int, model: str, numerics: Numerics, rank: Rank, meaning: str = ""
    ) -> None:
        kind = type(pool).__name__
        latent = kind == MLA
        first = int(pool.start_layer)
        layers = range(first, first + int(pool.layer_num))
        if kind == MHA:
            keys, values = list(pool.k_buffer), list(pool.v_buffer)
            planes = tuple(Plane(n, dtype_name(t[0].dtype), t[0].shape[-1]) for n, t in (("k", keys), ("v", values)))
            heads, axes = int(pool.head_num), "slot head dim"
            tensors: Any = {"k": keys, "v": values}
        elif kind == MLA:
            tensors = list(pool.kv_buffer)
            planes = (Plane("latent", dtype_name(tensors[0].dtype), tensors[0].shape[-1]),)
            heads, axes = 1, "slot one latent"
        else:
            raise UnsupportedError(f"KV pools of type {kind} are not supported; {MHA} and {MLA} are")
        group = LayerGroup("kv", tuple(layers), planes, heads if latent else heads * rank.tp_size)
        held = (0, 1) if latent else (rank.tp_rank * heads, (rank.tp_rank + 1) * heads)
        self.spec = KVSpec(model, (group,), (Rect((layers.start, layers.stop), held),), numerics, meaning)
        self.spec.validate()
        self.kv = PagedKV(tensors, Layout.parse(axes, block_tokens=page_tokens))
        try:
            self.device = self.kv.bind(self.spec).device
        except LMCacheError as error:
            raise UnsupportedError(f"the KV pool's layers are not {axes!r}: {error}") from None
        proof = self._prove(pool, max(SCRATCH_PAGES * page_tokens, _LEAST_SLOTS))
        if not proof:
            raise UnsupportedError(f"the KV pool's own writes contradict the layout {axes!r}: {proof.reason}")

    def _prove(self, pool: Any, scratch: int) -> Proof:
        """Proves the layout: SGLang's `set_kv_buffer` writes patterns into the first `scratch` slots, its attention views read
        them. Runs before the pool is in use; previous contents are restored."""
        first = int(pool.start_layer)
        slots = torch.arange(scratch)
        names = [plane.name for plane in self.spec.groups[0].planes]

        def write(group: int, layer: int, target: torch.Tensor, values: Values) -> None:
            parts = [values[name] for name in names]
            pool.set_kv_buffer(None, target, parts[0], parts[-1], layer_id_override=first + layer)

        def read(group: int, layer: int, target: torch.Tensor) -> Mapping[str, torch.Tensor]:
            views = (pool.get_key_buffer(first + layer), pool.get_value_buffer(first + layer))
            return {name: views[i][target] for i, name in enumerate(names)}

        flat = [t for plane in _planes(self.kv) for t in plane]
        saved = [tensor[:scratch].clone() for tensor in flat]
        try:
            return prove(self.kv.bind(self.spec), self.spec, write, slots, read=read)
        finally:
            for tensor, old in zip(flat, saved, strict=True):
                tensor[:scratch] = old


def _planes(kv: PagedKV) -> list[list[torch.Tensor]]:
    tensors: Any = kv.tensors
    return list(tensors.values()) if isinstance(tensors, Mapping) else [tensors]
