"""Our counters on SGLang's `/metrics`, which gathers what every process has written into `PROMETHEUS_MULTIPROC_DIR`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RANK = """
import torch
from lmcache import CacheEngine, Config, KVSpec, Layout, PagedKV
from lmcache_sglang.guard import Guarded

class Storage(Guarded):
    def __init__(self):
        super().__init__(config)
        self.engines = [CacheEngine(config, spec)]

    def _engines(self):
        return self.engines

config = Config(chunk_tokens=16, dram_bytes="1MiB")
spec = KVSpec.uniform(model="m", layers=1, kv_heads=1, head_dim=8, dtype=torch.float32)
kv = PagedKV([torch.randn(4, 1, 16, 16)], Layout.parse("block head slot (kv dim)", block_tokens=16))
for storage in (Storage(), Storage()):
    for first in (0, 100):
        tokens = list(range(first, first + 64))
        assert storage._safely("store", 0, lambda: storage.engines[0].store(tokens, kv, torch.arange(64))) == 64
    storage._safely("lookup", None, lambda: storage.engines[0].lookup(list(range(64))).release())
    storage.close()
"""

SERVER = """
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
for family in registry.collect():
    for sample in family.samples:
        if sample.name in ("lmcache_stored_tokens_total", "lmcache_hit_tokens_total"):
            print(sample.name, sorted(sample.labels.items()), sample.value)
"""


def test_every_count_of_every_rank_is_exported_once(tmp_path: Path) -> None:
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def process(code: str) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    process(RANK)
    process(RANK)
    assert sorted(process(SERVER)) == [
        "lmcache_hit_tokens_total [('tier', 'dram')] 256.0",
        "lmcache_stored_tokens_total [] 512.0",
    ]
