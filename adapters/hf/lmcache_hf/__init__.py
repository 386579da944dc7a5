"""KV cache for Hugging Face `generate`: wrap a model in `CachedModel` and call it as before.

    from lmcache_hf import CachedModel
    model = CachedModel(AutoModelForCausalLM.from_pretrained(...), Config(disk_path="~/.cache/lmcache"))

`smollm2()` gives the directory of a small real model that needs no hub.
"""

from lmcache_hf.model import CachedModel, UncachedError
from lmcache_hf.models import smollm2

__all__ = ["CachedModel", "UncachedError", "smollm2"]
