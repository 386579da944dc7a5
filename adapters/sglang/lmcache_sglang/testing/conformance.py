"""Declares this adapter to the conformance suite. Imports SGLang only when a session opens."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import msgspec

from lmcache_conformance.contract import Capabilities, SessionConfig

if TYPE_CHECKING:
    from lmcache_sglang.testing.session import SGLangSession


class SGLangAdapter:
    """The `EngineAdapter` of SGLang with HiCache."""

    name = "sglang"
    preload = "lmcache_sglang.testing.preload"
    """Module that a test run may import once before forking, so that sessions start much faster."""

    forks_ranks = True

    may_write = ("torch_extensions/*/.*.lock", "torch_extensions/*/*/*", "tmp/tmp*")
    """Files that SGLang leaves behind: its page hash, compiled from C++ once, and its sockets."""

    capabilities = Capabilities(
        models=("llama", "deepseek"),
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
        tensor_parallel=(1, 2),
        batch_invariant=False,
        device_cache=True,
    )

    def why_not(self) -> str | None:
        """Returns why SGLang cannot run here, or None."""
        if importlib.util.find_spec("sglang") is None:
            return "sglang is not installed"
        from lmcache_sglang.testing.environment import on_cpu, shims

        if on_cpu() and shims() is None:
            return "SGLang's cache hierarchy needs a GPU, or the shims in a checkout's adapters/sglang/tests/shims"
        return None

    def open(self, config: SessionConfig) -> SGLangSession:
        """Starts the engine."""
        from lmcache_sglang.testing.environment import enter

        enter()  # before SGLang is imported; again, as its module may have been imported before this process forked
        from lmcache_sglang.testing.session import SGLangSession

        return SGLangSession(config)


class LinkerAdapter(SGLangAdapter):
    """The `EngineAdapter` of SGLang with the linker, which shares keys with other engines."""

    name = "sglang-linker"
    capabilities = msgspec.structs.replace(
        SGLangAdapter.capabilities,
        tenant_clear=True,
        semantic=True,
        logprob_bound=1e-3,
    )

    def open(self, config: SessionConfig) -> SGLangSession:
        """Starts the engine."""
        from lmcache_sglang.testing.environment import enter

        enter()
        from lmcache_sglang.testing.session import LinkerSession

        return LinkerSession(config)


adapter = SGLangAdapter()
linker = LinkerAdapter()
