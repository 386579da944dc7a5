"""What this adapter claims, for the conformance suite. Light: nothing of transformers is imported before a session opens."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lmcache_conformance.contract import Capabilities, SessionConfig

if TYPE_CHECKING:
    from lmcache_hf.testing.session import HFSession


class HFAdapter:
    """The `EngineAdapter` of Hugging Face transformers. Whatever `CachedModel` promises is claimed here."""

    name = "hf"
    preload = "lmcache_hf.testing.preload"
    """May be imported before forking: sessions of a test run then start in a fraction of the time."""

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
        """None where transformers is installed."""
        return None if importlib.util.find_spec("transformers") else "transformers is not installed"

    def open(self, config: SessionConfig) -> HFSession:
        """Load the model."""
        from lmcache_hf.testing.session import HFSession

        return HFSession(config)


adapter = HFAdapter()
