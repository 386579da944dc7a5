"""Sets vLLM's environment for tests: one process, a small cache, no telemetry, one thread. Import it before vLLM."""

from __future__ import annotations

import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",  # otherwise each process spends seconds compiling the ranking of log-probs
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # tiny models gain nothing, and spinning threads slow down other tests
}.items():
    os.environ.setdefault(_name, _value)
