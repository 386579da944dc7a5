"""Declares this adapter to the conformance suite. Imports transformers only when a session opens."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lmcache_conformance.contract import Capabilities, SessionConfig

if TYPE_CHECKING:
    from lmcache_hf.testing.session import HFSession


class HFAdapter:
    """The `EngineAdapter` of Hugging Face transformers; claims everything that `CachedModel` supports."""

    name = "hf"
    preload = "lmcache_hf.testing.preload"
    """Module that a test run may import once before forking, so that sessions start much faster."""

    capabilities = Capabilities(
        models=("llama", "gemma3", "deepseek", "smollm2"),
        dtypes=("float32", "bfloat16"),
        logprobs=True,
        same_split=True,
        restart=True,
        salt=True,
        concurrent=True,
        cancel=True,
        semantic=True,
        logprob_bound=1e-3,
    )

    def why_not(self) -> str | None:
        """Returns why this adapter cannot run here, or None."""
        return None if importlib.util.find_spec("transformers") else "transformers is not installed"

    def open(self, config: SessionConfig) -> HFSession:
        """Loads the model."""
        from lmcache_hf.testing.session import HFSession

        return HFSession(config)


adapter = HFAdapter()
