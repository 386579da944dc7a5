"""What this adapter claims, for the conformance suite. Light: nothing of SGLang is imported before a session opens."""

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
    """May be imported before forking: sessions of a test run then start in a fraction of the time."""

    forks_ranks = True

    may_write = ("torch_extensions/*/.*.lock", "torch_extensions/*/*/*", "tmp/tmp*")
    """SGLang builds its page hash in C++ once, and leaves the names of its sockets."""

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
        """None where SGLang is installed and can run."""
        if importlib.util.find_spec("sglang") is None:
            return "sglang is not installed"
        from lmcache_sglang.testing.environment import on_cpu, shims

        if on_cpu() and shims() is None:
            return "SGLang's cache hierarchy needs a GPU; without one, the stand-ins of a checkout's adapters/sglang/tests/shims"
        return None

    def open(self, config: SessionConfig) -> SGLangSession:
        """Start the engine."""
        from lmcache_sglang.testing.environment import enter

        enter()  # before anything of SGLang; once more where its module was imported before this process forked
        from lmcache_sglang.testing.session import SGLangSession

        return SGLangSession(config)


class LinkerAdapter(SGLangAdapter):
    """The `EngineAdapter` of SGLang with the linker: KV has every engine's names."""

    name = "sglang-linker"
    capabilities = msgspec.structs.replace(
        SGLangAdapter.capabilities,
        tenant_clear=True,
        semantic=True,
        logprob_bound=1e-3,
    )

    def open(self, config: SessionConfig) -> SGLangSession:
        """Start the engine."""
        from lmcache_sglang.testing.environment import enter

        enter()
        from lmcache_sglang.testing.session import LinkerSession

        return LinkerSession(config)


adapter = SGLangAdapter()
linker = LinkerAdapter()
