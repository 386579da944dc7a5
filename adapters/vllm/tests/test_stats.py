"""Our counters on vLLM's `/metrics`, which gathers what every process has written into `PROMETHEUS_MULTIPROC_DIR`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

ENGINE = """
from lmcache.observe.metrics import Metrics
metrics = Metrics()
metrics.hit("dram", 192)
metrics.hit("disk", 64)
"""

API_SERVER = """
import sys
import lmcache_vllm.testing.environment
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from lmcache_vllm.stats import PromMetrics

def base(self, config, types, labels, values):
    self.per_engine_labelvalues = values

KVConnectorPromMetrics.__init__ = base
metrics = PromMetrics(None, {Counter: Counter}, ["model_name", "engine"], {0: ["m", "0"]})
metrics.observe({"lmcache_hit_tokens_total|dram": float(sys.argv[1])})
registry = CollectorRegistry()
MultiProcessCollector(registry)
for family in registry.collect():
    for sample in family.samples:
        if sample.name == "lmcache_hit_tokens_total":
            print(sorted(sample.labels.items()), sample.value)
"""


def test_several_api_servers_export_every_count_of_the_engine_once(tmp_path: Path) -> None:
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def process(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=True).stdout

    process(ENGINE)
    process(API_SERVER, "128")  # the engine hands each increment to one of the servers
    scraped = process(API_SERVER, "64").splitlines()
    assert scraped[-1] == "[('engine', '0'), ('model_name', 'm'), ('tier', 'dram')] 192.0"
    assert sum("tier" in line for line in scraped) == 1


def test_an_old_module_path_works_without_the_core_having_been_imported() -> None:
    code = "import lmcache_vllm.environment as old; from lmcache_vllm.testing import environment; print(old.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "lmcache_vllm.environment\n"
