"""The SGLang adapter: a HiCache storage backend that keeps pages of KV on disk, verified before use.

    python -m lmcache_sglang --disk-path /var/cache/lmcache -- --model-path MODEL …
    Engine(model_path=…, **lmcache_sglang.server_args(disk_path="/var/cache/lmcache"))

Importing this package imports nothing of SGLang; `LMCacheStorage` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_sglang.launch import server_args

if TYPE_CHECKING:
    from lmcache_sglang.storage import LMCacheStorage

__all__ = ["LMCacheStorage", "server_args"]


def __getattr__(name: str) -> Any:
    """SGLang looks the backend up here: `module_path` is this package."""
    if name == "LMCacheStorage":
        from lmcache_sglang.storage import LMCacheStorage

        return LMCacheStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
