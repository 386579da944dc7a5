"""The vLLM adapter: a KV connector that caches KV in DRAM and on disk.

    vllm serve MODEL --kv-transfer-config '{"kv_connector":"LMCacheConnector","kv_role":"kv_both"}'

Importing this package does not import vLLM; accessing the connector does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lmcache  # noqa: F401  # makes this package's old module paths importable

if TYPE_CHECKING:
    from lmcache_vllm.connector import LMCacheConnector

__all__ = ["LMCacheConnector"]


def __getattr__(name: str) -> Any:
    """Loads the connector lazily, for a vLLM configured with this package as `kv_connector_module_path`."""
    if name == "LMCacheConnector":
        from lmcache_vllm.connector import LMCacheConnector

        return LMCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
