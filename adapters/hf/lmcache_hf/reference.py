"""Reference for cached answers: recomputation by the plain model in the same split, with stock transformers caches only."""

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
        ttft_s: time to first token, in seconds.
    """

    sequence: torch.Tensor
    logits: torch.Tensor
    ttft_s: float

    def identical(self, other: Answer) -> bool:
        """Whether tokens are equal and logits are equal bit for bit."""
        return torch.equal(self.sequence, other.sequence) and torch.equal(bits(self.logits), bits(other.logits))


def bits(values: torch.Tensor) -> torch.Tensor:
    """Returns the values' raw bytes, so that −0 differs from 0 and a NaN equals itself."""
    return values.contiguous().view(torch.uint8)


class _FirstToken:
    """A streamer that records when the first token arrives, which is its second `put`: the first one is the prompt."""

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
    """Runs greedy `generate` on one prompt (1-D ids), with a plain or a cached model."""
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
    """Follows a conversation with a plain model, computing each prompt in the split that a cached run uses.

    KV is computed here, kept in a stock transformers cache, and cut by transformers' own `crop`; the cache under test is not
    involved.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def answer(self, ids: torch.Tensor, hit_tokens: int, max_new_tokens: int) -> Answer:
        """Returns the answer, with KV of the first `hit_tokens` tokens taken from earlier rounds and the rest computed."""
        if hit_tokens == 0:
            self._cache = compat.fresh_cache(self._model)
            self._cache.activate_past_recording()  # otherwise a sliding layer cannot be cropped
        else:
            self._cache.crop(hit_tokens - self._cache.get_seq_length())
        return answer(self._model, ids, max_new_tokens, past_key_values=self._cache)
