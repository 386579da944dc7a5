"""What a cached answer is compared with: recomputation by the plain model in the same split, with stock caches only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lmcache_hf import compat


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        sequence: prompt and generated ids, 1-D.
        logits: (generated tokens, vocabulary), before any processing.
        ttft_s: seconds until the first token was there.
    """

    sequence: torch.Tensor
    logits: torch.Tensor
    ttft_s: float

    def identical(self, other: Answer) -> bool:
        """Same tokens, and the same logits bit for bit."""
        return torch.equal(self.sequence, other.sequence) and torch.equal(bits(self.logits), bits(other.logits))


def bits(values: torch.Tensor) -> torch.Tensor:
    """The values as integers, so that −0 differs from 0 and a NaN equals itself."""
    return values.contiguous().view(torch.uint8)


class _FirstToken:
    """A streamer that notes when the first token comes; `generate` hands it the prompt before."""

    def __init__(self) -> None:
        self.puts = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def answer(model: Any, ids: torch.Tensor, max_new_tokens: int, **more: Any) -> Answer:
    """Greedy `generate` of one prompt (1-D ids), by a plain or a cached model."""
    first = _FirstToken()
    start = time.perf_counter()
    out = model.generate(
        ids[None].to(model.device),
        attention_mask=torch.ones_like(ids[None]).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=first,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
    return Answer(out.sequences[0].cpu(), torch.cat(out.logits).float().cpu(), first.at - start)


class Recomputation:
    """A plain model that follows a conversation, computing each prompt in the split in which a cache would.

    Its KV is computed here, kept in transformers' own cache, and cut by transformers' own `crop`: nothing of the cache
    under test takes part.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def answer(self, ids: torch.Tensor, hit_tokens: int, max_new_tokens: int) -> Answer:
        """The answer after the first `hit_tokens` tokens were taken from the rounds before, and the rest computed."""
        if hit_tokens == 0:
            self._cache = compat.fresh_cache(self._model)
            self._cache.activate_past_recording()  # or a sliding layer could not be cut
        else:
            self._cache.crop(hit_tokens - self._cache.get_seq_length())
        return answer(self._model, ids, max_new_tokens, past_key_values=self._cache)
