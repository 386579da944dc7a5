"""Everything that a session imports sooner or later, to be imported once before many sessions fork. See `conformance`."""

import lmcache_vllm.session  # noqa: F401  # it sets vLLM's environment first

import vllm.entrypoints.llm  # isort: skip
import vllm.model_executor.models.gemma3  # isort: skip
import vllm.model_executor.models.llama  # isort: skip
import vllm.v1.worker.cpu_model_runner  # isort: skip
import vllm.v1.worker.cpu_worker  # noqa: F401  # isort: skip

import lmcache.tiers.disk  # noqa: F401  # isort: skip
