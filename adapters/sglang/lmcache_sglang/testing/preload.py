"""Imports everything that a session needs, once, before many sessions fork. See `conformance`."""

import gc
from importlib import import_module

for _name in (
    "lmcache_sglang.testing.environment",  # before SGLang
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",  # which imports every model
    "lmcache_sglang.testing.observed",
    "lmcache_sglang.testing.session",
    "lmcache.tiers.disk",
):
    import_module(_name)

gc.freeze()  # SGLang collects garbage on each cache flush, which takes 0.4 s with a million imported objects
