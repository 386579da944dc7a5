"""Imports everything that a session imports sooner or later, once, before many sessions fork. See `conformance`."""

import gc
from importlib import import_module

for _name in (
    "lmcache_vllm.testing.environment",  # before anything of vLLM
    "lmcache_vllm.testing.session",
    "lmcache.tiers.disk",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.gemma3",
    "vllm.model_executor.models.llama",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
):
    import_module(_name)

gc.freeze()  # vLLM collects garbage again and again as it starts, and a million objects of imports take it half a second
