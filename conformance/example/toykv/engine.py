"""A toy engine: a small transformer with KV in pages of 8 tokens, and its adapter for the conformance suite.

Each token is computed separately, so the bits do not depend on how a prompt is split: any recomputation equals
recomputation in the same split, which the suite compares with.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from lmcache import CacheEngine, Config, KVSpec, Layout, PagedKV
from lmcache.keys import model_identity
from lmcache.spec import Numerics
from lmcache_conformance.contract import Capabilities, Request, Response, SessionConfig

BLOCK, BLOCKS = 8, 512


class Model:
    """Attention with Llama's projections, RMS norms and sine position embeddings; no MLP."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.layers, self.heads, self.kv_heads, self.dim = (
            config[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        )
        self.weights = load_file(folder / "model.safetensors")
        self.frequencies = torch.arange(config["hidden_size"]) / 37.0

    def step(self, token: int, position: int, pages: list[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
        """Writes one token's KV into its slot and returns its logits. `pages[layer]`: (block, head, slot, 2 · dim)."""
        x = self.weights["model.embed_tokens.weight"][token] + torch.sin(position * self.frequencies)
        block, offset = slots // BLOCK, slots % BLOCK
        for layer, page in enumerate(pages):
            q, k, v, o = (self.weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
            h = x / x.square().mean().sqrt()
            page[block[-1], :, offset[-1]] = torch.cat([(k @ h).view(-1, self.dim), (v @ h).view(-1, self.dim)], dim=1)
            keys, values = page[block, :, offset].split(self.dim, dim=2)  # (tokens, kv heads, dim) each
            query = (q @ h).view(self.kv_heads, -1, self.dim)  # (kv heads, queries per head, dim)
            scores = torch.einsum("hqd,thd->hqt", query, keys) / self.dim**0.5
            x = x + o @ torch.einsum("hqt,thd->hqd", scores.softmax(2), values).reshape(-1)
        return self.weights["lm_head.weight"] @ (x / x.square().mean().sqrt())


class Session:
    """The engine with a cache. Implements the protocol `lmcache_conformance.contract.Session`."""

    def __init__(self, config: SessionConfig) -> None:
        torch.set_num_threads(1)
        self.model = Model(Path(config.model))
        shape = {"layers": self.model.layers, "kv_heads": self.model.kv_heads, "head_dim": self.model.dim}
        spec = KVSpec.uniform(
            model_identity(config.model),
            **shape,
            dtype=config.dtype,
            numerics=Numerics(engine="toy", dtype=config.dtype),
        )
        self.pages = [
            torch.zeros(BLOCKS, self.model.kv_heads, BLOCK, 2 * self.model.dim) for _ in range(self.model.layers)
        ]
        self.kv = PagedKV(self.pages, Layout.parse("block head slot (kv dim)", block_tokens=BLOCK))
        self.cache = CacheEngine(Config(**config.cache), spec)

    def generate(self, requests: list[Request], *, reuse: bool = True) -> list[Response]:
        return [self._answer(request, reuse) for request in requests]

    def _answer(self, request: Request, reuse: bool) -> Response:
        tokens, cached, logprobs = list(request.tokens), {}, []
        slots = self._allocate(len(tokens) + request.max_new_tokens)
        loaded = 0
        if reuse:
            with self.cache.lookup(tokens, salt=request.salt, max_tokens=len(tokens) - 1) as hit:
                loaded = self.cache.retrieve(hit, self.kv, slots[: hit.tokens])
                cached = hit.by_tier if loaded == hit.tokens else {"dram": loaded}
        for position in range(loaded, len(tokens) + request.max_new_tokens - 1):
            logits = self.model.step(tokens[position], position, self.pages, slots[: position + 1])
            if position == len(tokens) - 1:
                logprobs.append(logits.log_softmax(0))
                tokens.append(int(logits.argmax()))
        if reuse:  # the last token was only sampled and has no KV
            self.cache.store(tokens[:-1], self.kv, slots[: len(tokens) - 1], salt=request.salt)
        new = tokens[len(request.tokens) :]
        return Response(
            tokens=tuple(new),
            logprobs=tuple(one.numpy().tobytes() for one in logprobs),
            logprob=tuple(float(one[token]) for one, token in zip(logprobs, new, strict=True)),
            cached=cached,
        )

    def _allocate(self, tokens: int) -> torch.Tensor:
        """Returns slots in randomly chosen pages, which still contain the KV of earlier requests."""
        blocks = torch.tensor(random.sample(range(BLOCKS), -(-tokens // BLOCK)))
        return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:tokens]

    def forget_splits(self) -> None: ...

    def drop_device_cache(self) -> None: ...

    def flush(self) -> None:
        self.cache.flush()

    def clear(self, salt: str | None = None) -> None:
        self.cache.clear(salt=salt)

    def stats(self) -> dict[str, float]:
        return self.cache.stats()

    def close(self) -> None:
        self.cache.close()


class Adapter:
    """Registered as `toy` under `lmcache.adapters` in pyproject.toml."""

    name = "toy"
    preload = "toykv.engine"
    capabilities = Capabilities(
        models=("llama",), dtypes=("float32",), logprobs=True, same_split=True, restart=True, salt=True
    )

    def why_not(self) -> str | None:
        return None

    def open(self, config: SessionConfig) -> Session:
        return Session(config)


adapter = Adapter()
