"""The interface between the suite and an engine adapter: sessions, requests, responses, and the adapter's capabilities.

An adapter takes part by registering an `EngineAdapter` under the entry point group `lmcache.adapters`. The suite opens
*sessions* with it, each in its own child process, so that an engine that crashes, hangs or kills its process tree is
reported as a failed test. Everything that crosses the process boundary is encoded with msgspec; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

ENTRY_POINTS = "lmcache.adapters"
"""Entry point group in which adapters are found by name; each loads as an `EngineAdapter`."""

PATIENT: Mapping[str, float] = MappingProxyType({"probe_timeout_s": 20.0})
"""Cache settings for tests: a shared tier that answers after the timeout is a miss, and test machines may be busy."""


class Level(str, Enum):  # noqa: UP042 (a StrEnum would print differently)
    """What a test proves. Each test of the suite belongs to one level."""

    BYTES = "bytes"  # gather → any tiers → scatter returns every bit and changes no other slot
    LOGITS = "logits"  # log-probs after a hit equal those of same-split recomputation, bit for bit
    TOKENS = "tokens"  # so do greedy tokens; in fp32 they also equal those of a one-shot cold run
    RESTART = "restart"  # the same in a new process, from disk alone
    FAULTS = "faults"  # damage, full and slow disks, kill −9: correct tokens, no hang, no flushed data lost
    KEYS = "keys"  # whatever changes KV values changes their keys
    ISOLATION = "isolation"  # two tenants never share a hit
    PRESSURE = "pressure"  # tiny tiers, constant eviction, interleaved requests
    PREEMPTION = "preemption"  # a request that loses its device memory midway resumes correctly
    CONCURRENCY = "concurrency"  # many requests at once, shared and distinct prefixes, some cancelled
    CHUNKED_PREFILL = "chunked_prefill"  # the engine splits prompts itself
    MISS = "miss"  # what was never stored is never a hit
    RESET = "reset"  # after `clear` nothing is served
    APPROXIMATE = "approximate"  # semantic sharing across engines stays within its declared bound


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine adapter supports. Tests of unclaimed capabilities are skipped with that reason; claimed ones must pass.

    Attributes:
        models: supported architectures, out of those in `lmcache_conformance.labs.models`: `llama`, `gemma3`, `deepseek`,
            `mellum`, `smollm2`.
        dtypes: supported compute dtypes, as torch dtype names.
        logprobs: reports log-probs (or logits) exactly; needed by level `logits`.
        same_split: `Session.generate(..., reuse=False)` recomputes in the split in which a hit was computed.
        restart: a new process can be served from a disk folder.
        salt: requests can carry a cache salt.
        tenant_clear: `Session.clear(salt)` keeps other tenants' KV. False where the engine's own keys do not reveal the tenant.
        lora: requests can carry a LoRA adapter.
        images: requests can carry images.
        concurrent: several requests can run at once.
        batch_invariant: the bits of a response do not depend on the other requests in the batch. Where they do, concurrent
            responses are compared by tokens, and in exact dtypes only.
        cancel: a running request can be cancelled.
        preemption: the engine can be made to preempt (tiny device cache).
        chunked_prefill: the engine can be made to split prompts.
        tensor_parallel: tensor parallel sizes that can run here.
        device_cache: the engine has its own device prefix cache, which `drop_device_cache` empties.
        semantic: KV can be shared across engines (`share="semantic"`).
        logprob_bound: for level `approximate`: the largest |Δ log-prob| caused by another engine's KV; 0 claims nothing.
    """

    models: tuple[str, ...] = ("llama",)
    dtypes: tuple[str, ...] = ("float32",)
    logprobs: bool = False
    same_split: bool = False
    restart: bool = False
    salt: bool = False
    tenant_clear: bool = True
    lora: bool = False
    images: bool = False
    concurrent: bool = False
    batch_invariant: bool = True
    cancel: bool = False
    preemption: bool = False
    chunked_prefill: bool = False
    tensor_parallel: tuple[int, ...] = (1,)
    device_cache: bool = False
    semantic: bool = False
    logprob_bound: float = 0.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt. With `cancel_after` > 0 it is cancelled once that many tokens have been generated."""

    tokens: tuple[int, ...]
    max_new_tokens: int = 8
    salt: str = ""
    lora: str = ""
    cancel_after: int = 0


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a request.

    Attributes:
        tokens: generated token ids.
        logprobs: per generated token, the bytes of the distribution that the engine reports (log-probs or logits, in a
            fixed order and dtype), compared bit for bit. Empty if the engine reports none.
        logprob: per generated token, the log-prob of the sampled token, compared within a bound (level `approximate`).
        cached: number of prompt tokens that were not computed, by source: `device`, `dram`, `disk`, …
        error: why the request failed; empty if it succeeded.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[bytes, ...] = ()
    logprob: tuple[float, ...] = ()
    cached: Mapping[str, int] = {}
    error: str = ""

    @property
    def hit(self) -> int:
        """Prompt tokens loaded from the cache under test, from any tier; the engine's own device cache does not count."""
        return sum(n for source, n in self.cached.items() if source != "device")


class SessionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to open a session.

    Attributes:
        model: folder with config, weights and tokenizer, readable by `from_pretrained`.
        dtype: torch dtype name.
        cache: settings of `lmcache.Config`, e.g. `{"chunk_tokens": 16, "dram_bytes": "64MiB", "disk_path": …}`.
        options: engine-specific options (tensor parallel size, layout, …). The suite itself sets `prefill_tokens` (maximum
            prompt tokens per step; only if `chunked_prefill` is claimed), `device_tokens` (capacity of the engine's own KV
            memory, in tokens; only if `preemption` is claimed) and `tensor_parallel` (number of ranks).
    """

    model: str
    dtype: str = "float32"
    cache: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


class Session(Protocol):
    """A running engine that uses the cache under test. Methods are called from one thread, in a child process."""

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        """Runs all requests with greedy decoding, concurrently if there are several.

        `reuse=False` recomputes: the cache under test is neither read *nor written*, and the prompt is computed in the same
        split in which a hit on it was computed and stored (DESIGN: same-split recomputation). Sessions record what they
        need for that during earlier calls.
        """
        ...

    def forget_splits(self) -> None:
        """Makes later `reuse=False` calls recompute prompts in one shot, as a cold engine does."""
        ...

    def drop_device_cache(self) -> None:
        """Empties the engine's own prefix cache, if it has one; the cache under test keeps its contents."""
        ...

    def flush(self) -> None:
        """Blocks until everything stored so far has been written to the lower tiers."""
        ...

    def clear(self, salt: str | None = None) -> None:
        """Removes everything (or one tenant's data) from every tier of the cache under test."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Returns the cache's metrics."""
        ...

    def close(self) -> None:
        """Releases all resources."""
        ...


class EngineAdapter(Protocol):
    """What an adapter registers under `lmcache.adapters`.

    Optional attributes:
        preload: name of a module to import in the process that sessions fork from; it must not start threads or touch a
            device. Most sessions then start in a fraction of a second.
        forks_ranks: sessions with several ranks may be forked from that process, too.
        chunk_tokens: chunk size for the tests, if the default of 16 does not suit the engine's block size.
        may_write: patterns of files that the engine itself writes to the user's folders.
    """

    name: str
    capabilities: Capabilities

    def why_not(self) -> str | None:
        """Returns why this engine cannot run here (not installed, wrong version), or None if it can."""
        ...

    def open(self, config: SessionConfig) -> Session:
        """Starts the engine. Called in a child process."""
        ...


__all__ = [
    "ENTRY_POINTS",
    "Capabilities",
    "EngineAdapter",
    "Level",
    "Request",
    "Response",
    "Session",
    "SessionConfig",
]
