"""In which passes a prompt's KV was computed, so that it can be computed again in the very same ones, without any cache.

Kernels round differently at different shapes, so "what this prompt's KV is" depends on how it was cut: which columns one
prefill computed together, which came one by one while decoding. A `Pass` records one call of `generate` and points to the
pass whose columns it began with. Passes are played back on stock transformers caches, cut by transformers' own `crop`.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from lmcache_hf import quirks

Owner = tuple[str, str]
"""Tenant's salt, and what tells states of the weights apart."""

_KEPT = 4  # played-back caches; a conversation's next round starts from the last one


@dataclass(frozen=True, eq=False)
class Start:
    """Where a call began: with the first `columns` columns of what `source` computed.

    `source` None with columns > 0: an earlier process computed them, in passes unknown here.
    """

    columns: int = 0
    source: Pass | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """One call: it began at `start`, prefilled up to column `prompt`, and decoded the rest of `tokens` one by one."""

    tokens: tuple[int, ...]
    prompt: int
    start: Start


class Splits:
    """Who wrote which chunk, and where each prompt last began. Thread-safe."""

    def __init__(self, chunk_tokens: int) -> None:
        self.lock = threading.RLock()
        self._chunk = chunk_tokens
        self._writers: dict[tuple[Owner, bytes], Pass] = {}
        self._starts: dict[tuple[Owner, tuple[int, ...]], Start] = {}

    def began(self, owner: Owner, prompt: Sequence[int], columns: int) -> Start:
        """A call for this prompt took its first `columns` columns from the cache."""
        with self.lock:
            source = self._writers.get((owner, _name(prompt[:columns]))) if columns else None
            start = Start(columns, source)
            self._starts[owner, tuple(prompt)] = start
            return start

    def wrote(self, owner: Owner, done: Pass, first: int, last: int) -> None:
        """The chunks of columns [first, last) are in the cache now, as this pass computed them."""
        with self.lock:
            for end in range(first + self._chunk, last + 1, self._chunk):
                self._writers[owner, _name(done.tokens[:end])] = done

    def start_of(self, owner: Owner, prompt: Sequence[int]) -> Start:
        """Where the last call for this prompt began; if there was none, where one would begin now."""
        with self.lock:
            start = self._starts.get((owner, tuple(prompt)))
            if start is None:
                for end in range((len(prompt) - 1) // self._chunk * self._chunk, 0, -self._chunk):
                    if (source := self._writers.get((owner, _name(prompt[:end])))) is not None:
                        return Start(end, source)
                return Start()
            if start.columns and start.source is None:  # its writer had not said so yet
                start = Start(start.columns, self._writers.get((owner, _name(prompt[: start.columns]))))
            return start

    def forget(self, salt: str | None) -> None:
        """The cache was cleared (of one tenant): nothing is there that anybody wrote."""
        with self.lock:
            self._writers = {key: done for key, done in self._writers.items() if salt not in (None, key[0][0])}
            self._starts = {key: start for key, start in self._starts.items() if salt not in (None, key[0][0])}


class Playback:
    """Computes passes again with a plain model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: OrderedDict[int, tuple[Pass, Any]] = OrderedDict()

    def cache_at(self, start: Start, prompt: Sequence[int]) -> Any:
        """A stock cache that holds the first `start.columns` columns of `prompt`, computed as they were."""
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
        """At least the first `columns` columns of a pass: its prefill as a whole, and of its decoding what is needed."""
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
        cache: Any = quirks.fresh_cache(self._model)
        cache.activate_past_recording()  # or a sliding layer could not be cut
        return cache

    def _run(self, tokens: Sequence[int], prompt: int, cache: Any) -> None:
        """Prefill `prompt` columns and decode the others, whatever the model would have said."""
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
    """Lets only the given sequence be generated."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        at = input_ids.shape[1]
        if at >= len(self._tokens):
            return scores
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self._tokens[at]] = 0
        return forced


def _name(tokens: Sequence[int]) -> bytes:
    """Not the names under test: these must be right even where those are not."""
    return hashlib.sha256(repr(list(tokens)).encode()).digest()
