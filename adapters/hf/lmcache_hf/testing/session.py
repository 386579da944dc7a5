"""The conformance suite's session with a model: an instrumented `CachedModel`, and recomputation in the same split."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as _logging

from lmcache.config import Config
from lmcache.engine import Hit
from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.labs.splits import Owner, Pass, Splits, Start
from lmcache_hf.batch import Prompt
from lmcache_hf.model import CachedModel
from lmcache_hf.reuse import Reuse
from lmcache_hf.testing.playback import Playback


@dataclass
class Observed:
    """What one call of `generate` loaded from the cache."""

    prompt: int = 0
    columns: int = 0
    by_tier: Mapping[str, int] = field(default_factory=dict)
    start: Start = field(default_factory=Start)

    def cached(self) -> dict[str, int]:
        """Returns loaded columns by tier. If a load ended early, the missing columns are subtracted from the last tiers."""
        left, found = self.columns, {}
        for tier, tokens in self.by_tier.items():
            if left > 0:
                found[tier] = min(left, tokens)
                left -= found[tier]
        return found


@dataclass(frozen=True)
class ObservedReuse(Reuse):
    """Records what is loaded, and which pass stored what; otherwise identical to `Reuse`."""

    splits: Splits = field(default_factory=lambda: Splits(1))
    seen: Observed = field(default_factory=Observed)

    @property
    def owner(self) -> Owner:
        """Salt and weights digest that this KV belongs to."""
        return self.salt, self.lora

    def load(self, prompt: Prompt, cache: DynamicCache) -> int:
        """See `Reuse.load`; recorded."""
        columns = super().load(prompt, cache)
        self.seen.prompt, self.seen.columns = prompt.columns, columns
        self.seen.start = self.splits.began(self.owner, prompt.ids[0].tolist(), columns)
        return columns

    def _common_prefix(self, prompt: Prompt, stop: int, leases: ExitStack) -> tuple[list[Hit], int]:
        hits, columns = super()._common_prefix(prompt, stop, leases)
        self.seen.by_tier = hits[0].by_tier if hits else {}
        return hits, columns

    def store(self, prompt: Prompt, cache: DynamicCache, first: int) -> int:
        """See `Reuse.store`; records which chunks were not cached before, as cached ones are not replaced."""
        ids = prompt.tokens(0)
        with self.splits.lock:
            before = self._there(ids)
            accepted = super().store(prompt, cache, first)
            done = Pass(tuple(ids.tolist()), self.seen.prompt, self.seen.start)
            self.splits.wrote(self.owner, done, before, self._there(ids))
        return accepted

    def _there(self, ids: torch.Tensor) -> int:
        with self.engine.lookup(ids, salt=self.salt, lora=self.lora) as hit:
            return hit.tokens


class ObservedModel(CachedModel):
    """A `CachedModel` that records, per call, what it loaded from the cache."""

    def __init__(self, model: Any, config: Config, *, reuse: type[ObservedReuse], identity: str | None = None) -> None:
        self._reuse_type = reuse
        self.splits = Splits(config.chunk_tokens)
        self.current = threading.local()
        super().__init__(model, config, identity=identity)

    def _reuse(self, opened: Any, digest: str, salt: str) -> Reuse:
        seen = getattr(self.current, "seen", None) or Observed()
        return self._reuse_type(opened.engine, opened.geometry, salt, digest, self.splits, seen)


class HFSession:
    """A model in this process. Deliberately broken adapters replace `reuse` and `wrapper`."""

    reuse: type[ObservedReuse] = ObservedReuse
    wrapper: type[ObservedModel] = ObservedModel
    identity: str | None = None

    def __init__(self, config: SessionConfig) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        logging: Any = _logging  # untyped
        logging.disable_progress_bar()
        torch.set_num_threads(1)  # same summation order in every thread
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.options.get("attn_implementation", "sdpa"),
        )
        self._model = model.eval()
        self._cached = self.wrapper(self._model, Config(**dict(config.cache)), reuse=self.reuse, identity=self.identity)
        self._playback = Playback(self._model)
        self._one_shot = False

    @property
    def cached_model(self) -> CachedModel:
        """The model under test."""
        return self._cached

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        """Runs each request in its own thread; recomputation is sequential."""
        if not reuse:
            return [self._answered(request, self._recompute) for request in requests]
        if len(requests) == 1:
            return [self._answered(requests[0], self._serve)]
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self._answered(request, self._serve), requests))

    def _answered(self, request: Request, how: Any) -> Response:
        try:
            if request.lora:
                raise ValueError("this adapter identifies weights by their bytes; it does not support LoRA by name")
            answer: Response = how(request)
            return answer
        except _Cancelled as cancelled:
            return Response(tokens=tuple(cancelled.tokens), error="cancelled")
        except Exception as error:  # reported to the suite
            return Response(error=f"{type(error).__name__}: {error}")

    def _serve(self, request: Request) -> Response:
        seen = self._cached.current.seen = Observed()
        try:
            out = self._run(self._cached, request, cache_salt=request.salt)
        finally:
            self._cached.current.seen = None
        return _response(request, out, seen.cached())

    def _recompute(self, request: Request) -> Response:
        owner = (request.salt, "")
        start = Start() if self._one_shot else self._cached.splits.start_of(owner, request.tokens)
        cache = self._playback.cache_at(start, request.tokens)
        return _response(request, self._run(self._model, request, past_key_values=cache), {})

    def _run(self, model: Any, request: Request, **more: Any) -> Any:
        ids = torch.tensor([request.tokens], device=self._model.device)
        if request.cancel_after:
            more["streamer"] = _Canceller(request.cancel_after)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )

    def forget_splits(self) -> None:
        """Makes later recomputation one-shot."""
        self._one_shot = True

    def drop_device_cache(self) -> None:
        """Does nothing: there is no device cache; `generate` starts from the cache under test or from scratch."""

    def flush(self) -> None:
        """Blocks until everything stored is on disk."""
        self._cached.flush()

    def clear(self, salt: str | None = None) -> None:
        """Empties every tier (of one tenant)."""
        self._cached.clear(salt)
        self._cached.splits.forget(salt)

    def stats(self) -> Mapping[str, float]:
        """Returns the engine's metrics, and this adapter's counts as `hf_…`."""
        stats = self._cached.stats()
        engine, uncached = stats.pop("engine"), stats.pop("uncached")
        found: dict[str, float] = dict(engine)
        found |= {f"hf_{name}": float(value) for name, value in stats.items()}
        return found | {f"hf_uncached_{reason}": float(n) for reason, n in uncached.items()}

    def close(self) -> None:
        """Completes pending writes and closes the engine."""
        self._cached.close()


def _response(request: Request, out: Any, cached: Mapping[str, int]) -> Response:
    tokens = out.sequences[0, len(request.tokens) :].tolist()
    logits = torch.cat(out.logits).cpu()
    taken = torch.log_softmax(logits.double(), -1)[range(len(tokens)), tokens]
    return Response(
        tokens=tuple(tokens),
        logprobs=tuple(row.numpy().tobytes() for row in logits.float()),
        logprob=tuple(taken.tolist()),
        cached=cached,
    )


class _Cancelled(Exception):  # noqa: N818  # not an error
    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(f"after {len(tokens)} tokens")
        self.tokens = tokens


class _Canceller:
    """A streamer that simulates a client disconnecting: it raises out of `generate`, which has no other way to cancel."""

    def __init__(self, after: int) -> None:
        self._after = after
        self._tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, then each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += value.flatten().tolist()
        if len(self._tokens) >= self._after:
            raise _Cancelled(self._tokens)

    def end(self) -> None:
        """Does nothing."""
