"""Imports all modules that a session needs, once, before sessions are forked. See `conformance`."""

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

gc.freeze()  # vLLM runs the garbage collector repeatedly at start-up: half a second for a million objects of imports
