"""What the suite asks of an engine adapter, and what an adapter claims about itself. Plain data and one small protocol.

An adapter is adopted by registering an `EngineAdapter` under the entry point group `lmcache.adapters`. The suite opens
*sessions* with it, each in a child process of its own: an engine that crashes, hangs or kills its process tree is then a
result like any other. Everything that crosses the process boundary is msgspec-encoded; nothing is pickled.
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
"""Cache settings of tests: what a shared tier tells late is a miss, and nobody knows how busy the machine is."""


class Level(str, Enum):  # noqa: UP042 (a StrEnum would print differently)
    """What is proven. Each test of the suite belongs to one level."""

    BYTES = "bytes"  # gather → any tiers → scatter returns every bit, and no other slot changed
    LOGITS = "logits"  # log-probs after a hit equal those of same-split recomputation, bit for bit
    TOKENS = "tokens"  # greedy tokens likewise; in fp32 they also equal a one-shot cold run
    RESTART = "restart"  # the same in a new process, from disk alone
    FAULTS = "faults"  # damage, full and slow disks, kill −9: right tokens, nothing hung, nothing flushed lost
    KEYS = "keys"  # whatever changes values changes names
    ISOLATION = "isolation"  # two tenants never share a hit
    PRESSURE = "pressure"  # tiny tiers, constant eviction, interleaved requests
    PREEMPTION = "preemption"  # a request that loses its device memory midway resumes right
    CONCURRENCY = "concurrency"  # many requests at once, shared and distinct prefixes, some cancelled
    CHUNKED_PREFILL = "chunked_prefill"  # the engine splits prompts on its own
    MISS = "miss"  # what was never stored is never a hit
    RESET = "reset"  # after `clear` nothing is served
    APPROXIMATE = "approximate"  # semantic sharing across engines, held to its declared bound


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine adapter claims. What is not claimed is skipped, with that as the reason; what is claimed must pass.

    Attributes:
        models: architectures it can serve, of those in `lmcache_conformance.labs.models`: `llama`, `gemma3`, `deepseek`,
            `mellum`, `smollm2`.
        dtypes: torch dtype names in which it computes.
        logprobs: it reports log-probs (or logits) exactly; needed by level `logits`.
        same_split: `Session.generate(..., reuse=False)` recomputes in the split in which a hit was computed.
        restart: a disk folder serves a new process.
        salt: requests carry a cache salt.
        tenant_clear: `Session.clear(salt)` leaves other tenants' KV. Not where an engine's own keys hide whose they are.
        lora: requests carry a LoRA adapter.
        images: requests carry images.
        concurrent: several requests may run at once.
        batch_invariant: the bits of an answer do not depend on what else runs at once. Where they do, answers of a crowd are
            compared by tokens, in exact dtypes only.
        cancel: a running request can be cancelled.
        preemption: it can be made to preempt (tiny device cache).
        chunked_prefill: it can be made to split prompts.
        tensor_parallel: sizes it can run here.
        device_cache: it has a device cache of its own, which `drop_device_cache` empties.
        semantic: it can share KV across engines (`share="semantic"`).
        logprob_bound: level `approximate`: largest |Δ log-prob| of another engine's KV, 0 where it claims nothing.
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
    """One prompt. `cancel_after` > 0: cancel it when that many tokens were generated."""

    tokens: tuple[int, ...]
    max_new_tokens: int = 8
    salt: str = ""
    lora: str = ""
    cancel_after: int = 0


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request.

    Attributes:
        tokens: generated token ids.
        logprobs: per generated token, the bytes of what the engine reports of its distribution (log-probs or logits, in a
            fixed order and dtype): compared bit for bit. Empty where the engine reports none.
        logprob: per generated token, the log-prob of the token taken: compared within a bound (level `approximate`).
        cached: prompt tokens not computed, by source: `device`, `dram`, `disk`, …
        error: why there is no answer; empty if there is one.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[bytes, ...] = ()
    logprob: tuple[float, ...] = ()
    cached: Mapping[str, int] = {}
    error: str = ""

    @property
    def hit(self) -> int:
        """Prompt tokens that came from *our* cache, whatever the tier."""
        return sum(n for source, n in self.cached.items() if source != "device")


class SessionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to open a session.

    Attributes:
        model: folder with config, weights and tokenizer, as `from_pretrained` reads it.
        dtype: torch dtype name.
        cache: settings of `lmcache.Config`, e.g. `{"chunk_tokens": 16, "dram_bytes": "64MiB", "disk_path": …}`.
        options: engine-specific, from the adapter's own variants (tensor parallel size, layout, …). The suite itself sets
            `prefill_tokens` (at most so many prompt tokens in one step; only where `chunked_prefill` is claimed) and
            `device_tokens` (so many fit into the engine's own memory; only where `preemption` is claimed).
    """

    model: str
    dtype: str = "float32"
    cache: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


class Session(Protocol):
    """A running engine with our cache under it. Methods are called from one thread, in a child process."""

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        """Answer all requests, greedily, at once if there are several.

        `reuse=False`: recompute. Nothing of the cache under test is read *or written*; the prompt is computed in the very
        split in which a hit on it was computed and stored (DESIGN: same-split recomputation). Sessions remember what they
        need for that from their own earlier calls.
        """
        ...

    def forget_splits(self) -> None:
        """From here on `reuse=False` recomputes prompts in one shot, as a cold engine does."""
        ...

    def drop_device_cache(self) -> None:
        """Empty the engine's own prefix cache, if it has one; ours stays."""
        ...

    def flush(self) -> None:
        """Return when all that was stored is on the lower tiers."""
        ...

    def clear(self, salt: str | None = None) -> None:
        """Empty our cache (of one tenant) in every tier."""
        ...

    def stats(self) -> Mapping[str, float]:
        """The cache's metrics."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


class EngineAdapter(Protocol):
    """What an adapter registers under `lmcache.adapters`.

    It may have an attribute `preload`: the name of a module that can be imported before sessions fork from that process
    (nothing in it starts threads or touches a device). Most sessions then start in a fraction of a second, with `forks_ranks`
    those with several ranks, too. And an attribute
    `chunk_tokens`, where the suite's 16 do not suit the engine's blocks; and `may_write`, patterns of files that the engine
    itself leaves in the user's folders.
    """

    name: str
    capabilities: Capabilities

    def why_not(self) -> str | None:
        """The reason why this engine cannot run here (not installed, wrong version), or None."""
        ...

    def open(self, config: SessionConfig) -> Session:
        """Start the engine. Called in a child process."""
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
