"""The SGLang adapter: keeps KV beyond SGLang's own memory, as a HiCache storage backend or as an external cache linker.

    python -m lmcache_sglang --disk-path /var/cache/lmcache -- --model-path MODEL …
    Engine(model_path=…, **lmcache_sglang.server_args(disk_path="/var/cache/lmcache"))

Importing this package does not import SGLang; accessing `LMCacheStorage` or `LMCacheLinker` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_sglang.launch import server_args

if TYPE_CHECKING:
    from lmcache_sglang.linker import LMCacheLinker
    from lmcache_sglang.storage import LMCacheStorage

__all__ = ["LMCacheLinker", "LMCacheStorage", "server_args"]


def __getattr__(name: str) -> Any:
    """Loads classes on first use. SGLang finds both here, as `module_path` is this package."""
    if name == "LMCacheLinker":
        from lmcache_sglang.linker import LMCacheLinker

        return LMCacheLinker
    if name == "LMCacheStorage":
        from lmcache_sglang.storage import LMCacheStorage

        return LMCacheStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
