"""Replays recorded passes on stock transformers caches, cut by `crop`: see `lmcache_conformance.labs.splits`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from lmcache_conformance.labs.splits import Pass, Start
from lmcache_hf import compat

_KEPT = 4  # replayed caches; a conversation's next round starts from the last one


class Playback:
    """Recomputes passes with a plain model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: OrderedDict[int, tuple[Pass, Any]] = OrderedDict()

    def cache_at(self, start: Start, prompt: Sequence[int]) -> Any:
        """Returns a stock cache of the first `start.columns` columns of `prompt`, computed in the same split as originally."""
        if start.columns == 0:
            return self._fresh()
        if start.source is None:
            cache = self._fresh()
            self._run(prompt[: start.columns], start.columns, cache)
            return cache
        cache = copy.deepcopy(self._played(start.source, start.columns))
        if (beyond := cache.get_seq_length() - start.columns) > 0:
            cache.crop(-beyond)
        return cache

    def _played(self, done: Pass, columns: int) -> Any:
        """Returns a cache of at least the first `columns` columns of a pass: its whole prefill, and decoding as far as needed."""
        kept = self._kept.get(id(done))
        if kept is None or kept[1].get_seq_length() < columns:
            cache = self.cache_at(done.start, done.tokens)
            self._run(done.tokens[: max(columns, done.prompt)], done.prompt, cache)
            self._kept[id(done)] = done, cache
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(id(done))
        return self._kept[id(done)][1]

    def _fresh(self) -> Any:
        cache: Any = compat.fresh_cache(self._model)
        cache.activate_past_recording()  # otherwise a sliding layer cannot be cropped
        return cache

    def _run(self, tokens: Sequence[int], prompt: int, cache: Any) -> None:
        """Prefills `prompt` columns and decodes the others, forcing the given tokens."""
        ids = torch.tensor([list(tokens[:prompt])], device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=len(tokens) - prompt + 1,  # the last token generated has no column yet
            do_sample=False,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([_Forced(tokens)]),
        )


class _Forced(LogitsProcessor):
    """Forces the given sequence to be generated."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        at = input_ids.shape[1]
        if at >= len(self._tokens):
            return scores
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self._tokens[at]] = 0
        return forced
