"""vLLM's environment for tests, on import: one process, a small cache, no telemetry, one quiet thread. Before vLLM's import."""

from __future__ import annotations

import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",  # or every process compiles how log-probs are ranked, for seconds, to call it a few times
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # tiny models, and threads that spin harm whoever shares the machine
}.items():
    os.environ.setdefault(_name, _value)
