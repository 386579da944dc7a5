"""Describes this adapter to the conformance suite. Imports nothing of vLLM before a session opens."""

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
    """Module to import before forking, so that the sessions of a test run start faster."""

    forks_ranks = True

    chunk_tokens = 32
    """The smallest block size of the CPU backend."""

    may_write = ("vllm/modelinfos/*.json",)
    """vLLM's cache of information about model classes."""

    capabilities = Capabilities(
        models=("llama", "gemma3", "smollm2"),
        dtypes=("float32", "bfloat16"),
        logprobs=True,
        same_split=True,
        restart=True,
        salt=True,
        tenant_clear=False,
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
        """Returns why sessions cannot be opened; None if vLLM is installed."""
        return None if importlib.util.find_spec("vllm") else "vllm is not installed"

    def open(self, config: SessionConfig) -> VLLMSession:
        """Starts an engine."""
        import lmcache_vllm.testing.environment  # noqa: F401  # before anything of vLLM
        from lmcache_vllm.testing.session import VLLMSession

        return VLLMSession(config)


adapter = VLLMAdapter()
