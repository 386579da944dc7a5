"""KV cache for Hugging Face `generate`: wrap a model in `CachedModel` and call it as usual.

    from lmcache_hf import CachedModel
    model = CachedModel(AutoModelForCausalLM.from_pretrained(...), Config(disk_path="~/.cache/lmcache"))

`smollm2()` returns the directory of a small real model that needs no hub.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_hf.model import CachedModel as CachedModel
    from lmcache_hf.model import UncachedError as UncachedError
    from lmcache_hf.models import smollm2 as smollm2

_HOMES = {"CachedModel": "model", "UncachedError": "model", "smollm2": "models"}

__all__ = ["CachedModel", "UncachedError", "smollm2"]


def __getattr__(name: str) -> Any:  # lazy: reading the adapter's capabilities must not import transformers
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lmcache_hf' has no attribute {name!r}")
    value = getattr(import_module(f"lmcache_hf.{home}"), name)
    globals()[name] = value
    return value
