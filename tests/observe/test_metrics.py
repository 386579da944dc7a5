"""Metrics count their own events in their own registry; names follow the naming rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, generate_latest

from lmcache.control.outcomes import StopReason
from lmcache.observe.metrics import MISS_REASONS, Metrics


def test_every_method_moves_its_own_sample_and_no_other() -> None:
    metrics = Metrics()
    calls = {
        'lmcache_hit_tokens_total{tier="dram"}': lambda: metrics.hit("dram", 5),
        "lmcache_requested_tokens_total": lambda: metrics.requested(5),
        'lmcache_miss_tokens_total{reason="tail"}': lambda: metrics.missed("tail", 5),
        "lmcache_loaded_tokens_total": lambda: metrics.loaded(5),
        "lmcache_stored_tokens_total": lambda: metrics.stored(5),
        'lmcache_moved_bytes_total{src="dram",dst="disk"}': lambda: metrics.moved("dram", "disk", 5),
        'lmcache_evictions_total{tier="dram"}': lambda: metrics.evicted("dram", 5),
        'lmcache_corruptions_total{tier="disk"}': lambda: metrics.corrupted("disk", 5),
        'lmcache_failures_total{op="load",reason="late"}': lambda: metrics.failed("load", "late", 5),
        'lmcache_skipped_stores_total{reason="queue"}': lambda: metrics.skipped_store("queue", 5),
        'lmcache_uncached_requests_total{reason="beam-search"}': lambda: metrics.uncached("beam-search", 5),
        'lmcache_tier_bytes{tier="disk"}': lambda: metrics.tier("disk", 5),
    }
    for name, call in calls.items():
        before = metrics.snapshot()
        call()
        after = metrics.snapshot()
        assert {k: v for k, v in after.items() if before.get(k, 0.0) != v} == {name: 5.0}


def test_counters_add_up_and_gauges_replace() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.hit("dram", 256)
        metrics.queue(2, 4096)
        metrics.arena(0, free=1, writing=2, ready=3, evicting=4)
    values = metrics.snapshot()
    assert values['lmcache_hit_tokens_total{tier="dram"}'] == 768
    assert values["lmcache_queue_depth"] == 2
    assert values["lmcache_queue_bytes"] == 4096
    assert [
        values[f'lmcache_arena_slots{{group="0",state="{s}"}}'] for s in ("free", "writing", "ready", "evicting")
    ] == [1, 2, 3, 4]


def test_durations_are_counted_even_if_the_body_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    with monkeypatch.context() as patch:
        patch.setattr("lmcache.observe.metrics.perf_counter", iter([1.0, 1.25]).__next__)
        with metrics.timed("lookup"):
            pass
    with pytest.raises(KeyError), metrics.timed("store"):
        raise KeyError
    values = metrics.snapshot()
    assert values["lmcache_lookup_seconds_count"] == 1
    assert values["lmcache_lookup_seconds_sum"] == 0.25
    assert values["lmcache_store_seconds_count"] == 1
    assert values["lmcache_retrieve_seconds_count"] == 0


def test_two_caches_do_not_share_counters_nor_touch_the_global_registry() -> None:
    one, two = Metrics(), Metrics()
    one.stored(7)
    assert two.snapshot()["lmcache_stored_tokens_total"] == 0
    assert b"lmcache" not in generate_latest(REGISTRY)


def test_names_have_the_prefix_and_end_in_their_unit() -> None:
    metrics = Metrics()
    families = [
        (f.name + ("_total" if f.type == "counter" else ""), f.type, f.documentation)
        for f in metrics.registry.collect()
    ]
    assert len(families) >= 15
    for name, _, documentation in families:
        assert re.fullmatch(r"lmcache_[a-z_]+_(total|seconds|bytes|depth|slots|fallbacks)", name)
        assert documentation.endswith(".")


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def work() -> None:
        for i in range(500):
            metrics.hit(f"tier{i % 3}", 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(v for k, v in metrics.snapshot().items() if k.startswith("lmcache_hit_tokens_total")) == 2000


def test_serving_answers_on_the_local_machine_only_when_asked() -> None:
    metrics = Metrics()
    metrics.hit("dram", 3)
    port = metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b'lmcache_hit_tokens_total{tier="dram"} 3.0' in answer.read()


SHARED_FOLDER = """
import sys
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from lmcache.observe.metrics import Metrics
name = 'lmcache_hit_tokens_total{tier="disk"}'
first = Metrics()
first.hit("disk", 300)
second = Metrics()
fresh = second.snapshot().get(name, 0.0)
second.hit("disk", 10)
first.hit("disk", 5)
registry = CollectorRegistry()
scraped = 0.0
if len(sys.argv) > 1:
    MultiProcessCollector(registry)
    scraped += sum(s.value for f in registry.collect() for s in f.samples if s.name == "lmcache_hit_tokens_total")
print(first.snapshot()[name], fresh, second.snapshot()[name], scraped)
"""


@pytest.mark.parametrize("exists", [True, False])
def test_each_cache_counts_by_itself_whatever_the_folder_of_shared_metrics_is(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "gone"
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", SHARED_FOLDER, *(["scrape"] if exists else [])]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["305.0", "0.0", "10.0", "0.0"]
    assert list(tmp_path.iterdir()) == [], "what an engine exports for us must not be exported a second time"


def test_an_exposed_histogram_is_cumulative_and_ends_with_all() -> None:
    metrics = Metrics()
    for seconds in (1e-6, 1e-5, 3e-3, 100.0):
        metrics._seconds["lookup"].labels().observe(seconds)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'bucket{le="1e-05"} 2.0',
        'bucket{le="0.005"} 3.0',
        'bucket{le="10.0"} 3.0',
        'bucket{le="+Inf"} 4.0',
        "count 4.0",
    ):
        assert f"lmcache_lookup_seconds_{line}\n" in text


def test_every_stop_reason_has_a_documented_label_and_every_label_a_reason() -> None:
    assert {reason.metric for reason in StopReason} == set(MISS_REASONS)
