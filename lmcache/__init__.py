"""Engine-agnostic KV cache for LLM engines: a hit is bit-for-bit what was computed, or it is a miss.

The public names are loaded on first use, so that `import lmcache` is fast and imports no engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmcache import moved

if TYPE_CHECKING:
    from lmcache.config import Config as Config
    from lmcache.control.outcomes import FlushResult as FlushResult
    from lmcache.control.outcomes import StopReason as StopReason
    from lmcache.engine import CacheEngine as CacheEngine
    from lmcache.errors import ConfigError as ConfigError
    from lmcache.errors import FormatError as FormatError
    from lmcache.errors import FormatVersionError as FormatVersionError
    from lmcache.errors import LayoutError as LayoutError
    from lmcache.errors import LMCacheError as LMCacheError
    from lmcache.errors import SlotError as SlotError
    from lmcache.errors import SpecError as SpecError
    from lmcache.errors import TierError as TierError
    from lmcache.errors import TokenError as TokenError
    from lmcache.layout import Layout as Layout
    from lmcache.layout import PagedKV as PagedKV
    from lmcache.spec import HitRule as HitRule
    from lmcache.spec import KVSpec as KVSpec
    from lmcache.spec import LayerGroup as LayerGroup
    from lmcache.spec import Plane as Plane

    __version__: str

moved.install()

_MODULE_OF = {
    "CacheEngine": "engine",
    "Config": "config",
    "ConfigError": "errors",
    "FlushResult": "control.outcomes",
    "FormatError": "errors",
    "FormatVersionError": "errors",
    "HitRule": "spec",
    "KVSpec": "spec",
    "LMCacheError": "errors",
    "LayerGroup": "spec",
    "Layout": "layout",
    "LayoutError": "errors",
    "PagedKV": "layout",
    "Plane": "spec",
    "SlotError": "errors",
    "SpecError": "errors",
    "StopReason": "control.outcomes",
    "TierError": "errors",
    "TokenError": "errors",
}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lmcache-sdk")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'lmcache' has no attribute {name!r}")
    value = getattr(import_module(f"lmcache.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
