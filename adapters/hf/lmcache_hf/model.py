"""`CachedModel`: wraps a transformers model so that `generate` reuses KV across calls, processes and restarts."""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
import torch
from transformers import DynamicCache

from lmcache.adapter import UnsupportedError, describe, guarded
from lmcache.config import Config
from lmcache.engine import CacheEngine
from lmcache.errors import LMCacheError
from lmcache.observe.log import Throttle, info
from lmcache.spec import Numerics
from lmcache_hf import compat
from lmcache_hf.batch import Prompt
from lmcache_hf.calls import refuse_by_call
from lmcache_hf.geometry import Geometry, examine, meaning_of_model, numerics_of, probe
from lmcache_hf.reuse import Reuse
from lmcache_hf.weights import Glance, glance, is_changed, weights_digest


class UncachedError(LMCacheError):
    """Raised instead of running uncached when `Config.strict` is set."""


_Situation = tuple[Numerics, str, torch.device, torch.dtype]


@dataclass(frozen=True)
class _Opened:
    """An engine for the model as it was measured.

    Attributes:
        situation: what the measurement depends on: meaning, numerics, device and dtype.
        digest: of the weights at that time.
    """

    engine: CacheEngine
    geometry: Geometry
    template: DynamicCache
    situation: _Situation
    digest: str


@dataclass(frozen=True)
class _Prepared:
    """One call, ready to run with a cache filled from the engine; `columns` is how many columns were loaded."""

    arguments: dict[str, Any]
    cache: DynamicCache
    prompt: Prompt
    columns: int
    reuse: Reuse
    ends: tuple[int, ...]


def _own_device() -> AbstractContextManager[Any]:
    """Returns a context in which tensors of ours are on the CPU unless they name a device, whatever `torch.set_default_device`
    says.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


class CachedModel:
    """A model whose `generate` stores and reuses KV; everything else is the wrapped model's.

    The KV of prompts *and* of generated tokens is kept in DRAM and, if `config` sets `disk_path`, on disk; a later prompt with
    the same prefix reuses it. The output equals that of the model when it prefills in the same split. Calls that cannot be
    cached correctly run as if the model was not wrapped; the reason is in `stats()["uncached"]` and in one log line.

    Args:
        model: any decoder-only transformers model with `generate`.
        config: settings; `Config.load()` (environment and file) by default.
        identity: identifies the weights in cache keys instead of a digest of the weights in memory; the model's configuration is
            part of every key nevertheless. Only needed to share KV with another engine that uses the same identity
            (`share="semantic"`).

    Thread-safe.
    """

    def __init__(self, model: Any, config: Config | None = None, *, identity: str | None = None) -> None:
        self._model = model
        self._cache_config = config if config is not None else Config.load()
        self._identity = identity or self._cache_config.model_identity
        self._lock = threading.RLock()
        self._log = Throttle(every=math.inf)
        self._counts: Counter[str] = Counter()
        self._uncached: Counter[str] = Counter()
        self._opened: _Opened | None = None
        self._refused: tuple[object, UnsupportedError] | None = None
        self._glance: tuple[Glance, str] | None = None
        self._closed = False
        if not model.training:  # else at the first call in evaluation mode
            try:
                with _own_device():
                    self._open()
            except UnsupportedError as error:
                if self._cache_config.strict:
                    raise UncachedError(f"cannot cache {type(model).__name__}: {error}") from error
                self._log_uncached(error)

    # ------------------------------------------------------------------ generate

    def generate(self, *args: Any, cache_salt: str = "", **kwargs: Any) -> Any:
        """Calls the model's `generate`, with the same arguments and the same result.

        Args:
            *args, **kwargs: as for the model.
            cache_salt: KV stored under one salt is never used under another; use one salt per tenant.
        """
        prepared = self._prepare(args, kwargs, cache_salt)
        if prepared is None:
            return self._model.generate(*args, **kwargs)
        try:
            out = self._model.generate(**prepared.arguments)
            self._keep(prepared, out)
        finally:
            compat.disarm(prepared.cache)
        return out

    def hit_tokens(self, tokens: torch.Tensor | Sequence[int], *, cache_salt: str = "") -> int:
        """Returns how many leading tokens of one prompt `generate` would load instead of computing. No side effect."""
        with _own_device():
            try:
                opened, digest = self._current()
            except UnsupportedError:
                return 0
            ids = torch.as_tensor(tokens).reshape(-1).cpu()
            return self._reuse(opened, digest, cache_salt).hit_tokens(ids)

    def _prepare(self, args: Sequence[Any], kwargs: dict[str, Any], salt: str) -> _Prepared | None:
        """Loads the prompt's cached prefix. Raises only `UncachedError`, and only if `strict` is set.

        Returns:
            None if the call has to run uncached, with its arguments unchanged.
        """

        def load() -> _Prepared:
            call = compat.read_call(self._model, args, kwargs)
            refuse_by_call(self._model, call)
            ids = compat.prompt_of(self._model, call)
            if ids is None:
                raise UnsupportedError("the prompt is not a two-dimensional tensor of token ids", reason="no_tokens")
            mask = compat.mask_of(call, ids)
            if mask is None:
                raise UnsupportedError(
                    "its attention mask is not one value, 0 or 1, per token", reason="attention_mask"
                )
            with self._lock:
                if self._closed:
                    raise UnsupportedError("this CachedModel was closed", reason="closed")
                opened, digest = self._current()
            prompt = Prompt(ids.to("cpu", torch.int64), mask.cpu())
            return self._load(call, prompt, opened, self._reuse(opened, digest, salt))

        with _own_device():
            return guarded(load, None, self._prepare_failed)

    def _prepare_failed(self, error: Exception) -> None:
        """Counts and logs why a call runs uncached. `strict` raises for unsupported calls only, not for bugs of the cache."""
        if not isinstance(error, UnsupportedError):
            self._count_uncached(UnsupportedError(describe(error), reason="error"))
            return
        self._count_uncached(error)
        if self._cache_config.strict:
            raise UncachedError(f"cannot cache this call of generate: {error}") from error

    def _load(self, call: compat.Call, prompt: Prompt, opened: _Opened, reuse: Reuse) -> _Prepared:
        given = {
            n: c for n in ("past_key_values", "cache") if (c := {**call.arguments, **call.inputs}.get(n)) is not None
        }
        if len(given) > 1:
            raise UnsupportedError("the call passes two caches", reason="past_key_values")
        name, cache = next(iter(given.items()), (compat.cache_names(self._model)[0], None))
        if cache is None:
            cache = compat.fresh_cache(self._model)
        elif not compat.is_plain_empty(cache):
            raise UnsupportedError(
                f"the call passes a non-empty or special {type(cache).__name__}", reason="past_key_values"
            )
        layers = cache.layers
        if not compat.arm(cache, opened.template):
            raise UnsupportedError(
                "the layers of the call's cache differ from the model's own", reason="past_key_values"
            )
        try:
            columns = reuse.load(prompt, cache)
        except BaseException:
            cache.layers = layers
            raise
        arguments = {**call.arguments, name: cache}
        if not bool(prompt.mask.all()):
            ids = compat.prompt_of(self._model, call)
            assert ids is not None
            arguments["attention_mask"] = prompt.mask.to(ids.device, torch.int64)
        with self._lock:
            self._counts["calls"] += 1
            self._counts["prompt_tokens"] += int(prompt.before[:, -1].sum())
            self._counts["hit_tokens"] += int(prompt.before[:, columns].sum())
        return _Prepared(arguments, cache, prompt, columns, reuse, compat.end_tokens(call))

    def _keep(self, prepared: _Prepared, out: Any) -> None:
        """Stores what the call computed. Never raises."""

        def store() -> None:
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            computed = prepared.cache.get_seq_length()
            if computed < prepared.prompt.columns or computed > sequences.shape[1]:
                raise ValueError(f"the cache holds {computed} of {sequences.shape[1]} columns")
            grown = prepared.prompt.extended(sequences, computed)
            grown = grown.until_end(prepared.prompt.columns, prepared.ends)
            accepted = prepared.reuse.store(grown, prepared.cache, prepared.columns)
            with self._lock:
                self._counts["stored_tokens"] += accepted

        with _own_device():
            guarded(store, None, self._store_failed)

    def _store_failed(self, error: Exception) -> None:
        with self._lock:
            self._counts["store_errors"] += 1
        self._log.warning("hf-store-failed", error=describe(error))

    # ------------------------------------------------------------------ the model as it is now

    def _current(self) -> tuple[_Opened, str]:
        """Returns the engine for the current model, and its weights' digest, or `""` if they are those it was opened with."""
        with self._lock:
            opened = self._opened
            if opened is None or opened.situation != self._situation():
                opened = self._open()
            seen = glance(self._model)
            if self._glance is None or self._glance[0] != seen:
                self._glance = (seen, weights_digest(self._model))
            digest = self._glance[1]
            return opened, "" if digest == opened.digest else digest

    def _situation(self) -> _Situation:
        try:
            return numerics_of(self._model), meaning_of_model(self._model), self._model.device, self._model.dtype
        except Exception as error:  # not a transformers model
            raise UnsupportedError(describe(error), reason="unmeasured") from error

    def _open(self) -> _Opened:
        with self._lock:
            situation = self._situation()
            if self._refused is not None and self._refused[0] == situation:
                raise self._refused[1]
            if self._opened is not None:
                info("hf-reopened", reason="the model's configuration, device, dtype or a switch changed")
                self._opened.engine.close()
                self._opened = None
            try:
                geometry = examine(self._model)
                seen = glance(self._model)
                digest = weights_digest(self._model)
                numerics = self._measured(situation[0])
            except UnsupportedError as error:
                self._refused = situation, error
                raise
            except Exception as error:  # foreign models may raise anything
                self._refused = situation, UnsupportedError(describe(error), reason="unmeasured")
                raise self._refused[1] from error
            name = self._identity or f"hf:{type(compat.unwrapped(self._model)).__name__}:{digest}"
            if self._identity and is_changed(self._model):
                name += f" changed {digest}"
            engine = CacheEngine(self._cache_config, geometry.spec(name, numerics, situation[1]))
            weakref.finalize(self, engine.close)  # without close(), write-back still completes
            self._glance = seen, digest
            self._opened = _Opened(engine, geometry, compat.fresh_cache(self._model), situation, digest)
            return self._opened

    def _measured(self, numerics: Numerics) -> Numerics:
        """Adds the digest of bits that the model computes for a fixed prompt, unless they change from run to run."""
        try:
            bits, why = probe(self._model), "two runs gave different bits"
        except Exception as error:  # e.g. too little memory for the prompt
            bits, why = "", describe(error)
        if not bits:
            self._log.warning("hf-probe-left-out", reason=why)
            return numerics
        return msgspec.structs.replace(numerics, extra=(*numerics.extra, ("probe", bits)))

    def _reuse(self, opened: _Opened, digest: str, salt: str) -> Reuse:
        return Reuse(opened.engine, opened.geometry, salt, digest)

    def _count_uncached(self, error: UnsupportedError) -> None:
        with self._lock:
            self._uncached[error.reason] += 1
            if self._opened is not None:
                self._opened.engine.metrics.uncached(error.reason)
        self._log_uncached(error)

    def _log_uncached(self, error: UnsupportedError) -> None:
        self._log.warning("hf-uncached", key=error.reason, reason=error.reason, detail=error)

    # ------------------------------------------------------------------ housekeeping

    @property
    def model(self) -> Any:
        """The wrapped model."""
        return self._model

    @property
    def config(self) -> Any:
        """The model's configuration; the cache's is `cache_config`."""
        return self._model.config

    @property
    def cache_config(self) -> Config:
        """The cache's configuration."""
        return self._cache_config

    @property
    def engine(self) -> CacheEngine | None:
        """The cache engine; None if the model could not be cached so far."""
        return self._opened.engine if self._opened is not None else None

    def stats(self) -> dict[str, Any]:
        """Returns counts since this object was created.

        `calls`, `prompt_tokens`, `hit_tokens`, `stored_tokens`, `store_errors`; `uncached`: calls by reason; `engine`: the
        engine's metrics.
        """
        with self._lock:
            names = ("calls", "prompt_tokens", "hit_tokens", "stored_tokens", "store_errors")
            counts: dict[str, Any] = {name: self._counts[name] for name in names}
            engine = self._opened.engine if self._opened is not None and not self._closed else None
            return counts | {"uncached": dict(self._uncached), "engine": engine.stats() if engine else {}}

    def flush(self, *, durable: bool = False) -> None:
        """Blocks until everything stored is on the lower tiers (`durable`: and survives power loss)."""
        if self.engine is not None:
            self.engine.flush(durable=durable)

    def clear(self, cache_salt: str | None = None) -> None:
        """Removes all KV, or that of one tenant, from every tier."""
        if self.engine is not None:
            self.engine.clear(cache_salt)

    def close(self) -> None:
        """Completes pending writes and closes the engine; `generate` then runs uncached. Idempotent."""
        with self._lock:
            if not self._closed and self._opened is not None:
                self._opened.engine.close()
            self._closed = True

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def eval(self) -> CachedModel:
        """Puts the model into evaluation mode."""
        self._model.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> CachedModel:
        """Moves or converts the model; the engine is reopened at the next call."""
        self._model.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's forward pass; nothing is cached."""
        return self._model(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses `copy.copy`, `copy.deepcopy` and `pickle`."""
        raise TypeError(
            "a CachedModel owns an open cache and cannot be copied or pickled: "
            "copy or pickle its `model`, and wrap that in another CachedModel"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not set yet: copy and pickle look up attributes before __init__ runs
            raise AttributeError(name)
        return getattr(self._model, name)
