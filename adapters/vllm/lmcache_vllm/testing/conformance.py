"""What this adapter claims, for the conformance suite. Light: nothing of vLLM is imported before a session opens."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lmcache_conformance.contract import Capabilities, SessionConfig

if TYPE_CHECKING:
    from lmcache_vllm.testing.session import VLLMSession


class VLLMAdapter:
    """The `EngineAdapter` of vLLM."""

    name = "vllm"
    preload = "lmcache_vllm.testing.preload"
    """May be imported before forking: sessions of a test run then start in a fraction of the time."""

    forks_ranks = True

    chunk_tokens = 32
    """The CPU backend's smallest block."""

    may_write = ("vllm/modelinfos/*.json",)
    """vLLM remembers there what it has found out about model classes."""

    capabilities = Capabilities(
        models=("llama", "gemma3", "smollm2"),
        dtypes=("float32", "bfloat16"),
        logprobs=True,
        same_split=True,
        restart=True,
        salt=True,
        concurrent=True,
        cancel=True,
        preemption=True,
        chunked_prefill=True,
        batch_invariant=False,
        tensor_parallel=(1, 2),
        device_cache=True,
        semantic=True,
        logprob_bound=1e-3,
    )

    def why_not(self) -> str | None:
        """None where vLLM is installed."""
        return None if importlib.util.find_spec("vllm") else "vllm is not installed"

    def open(self, config: SessionConfig) -> VLLMSession:
        """Start the engine."""
        import lmcache_vllm.testing.environment  # noqa: F401  # before anything of vLLM
        from lmcache_vllm.testing.session import VLLMSession

        return VLLMSession(config)


adapter = VLLMAdapter()
