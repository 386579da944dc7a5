"""The vLLM adapter: a KV connector that keeps prompts' KV in DRAM and on disk.

    vllm serve MODEL --kv-transfer-config '{"kv_connector":"LMCacheConnector","kv_role":"kv_both"}'

Importing this package imports nothing of vLLM; the connector does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lmcache  # noqa: F401  # makes this package's old module paths importable

if TYPE_CHECKING:
    from lmcache_vllm.connector import LMCacheConnector

__all__ = ["LMCacheConnector"]


def __getattr__(name: str) -> Any:
    """vLLM looks the connector up here when it is given as `kv_connector_module_path`."""
    if name == "LMCacheConnector":
        from lmcache_vllm.connector import LMCacheConnector

        return LMCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
