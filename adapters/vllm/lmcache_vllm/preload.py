"""Imports everything that a session imports sooner or later, once, before many sessions fork. See `conformance`."""

from importlib import import_module

for _name in (
    "lmcache_vllm.environment",  # before anything of vLLM
    "lmcache_vllm.session",
    "lmcache.tiers.disk",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.gemma3",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
):
    import_module(_name)
