"""Admission to a disk in the connector's scheduler, by the fill levels that workers report. Without an engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from schedulerlab import CAPACITY, CHUNKS, ROOM, Workers

from lmcache.control.outcomes import TierInfo
from lmcache.spec import KVSpec
from lmcache_vllm.messages import Offer


def test_everything_is_written_while_the_disk_has_room_and_then_what_is_stored_again() -> None:
    workers = Workers("second")
    for number in range(30):
        workers.serve(number)
    assert len(workers.written) == ROOM
    stats = workers.scheduler.stats()
    assert stats["index_refused"] == stats['lmcache_skipped_stores_total{reason="admission"}'] == 30 * CHUNKS - ROOM
    workers.serve(29 - 5)  # evicted from DRAM, never written
    assert len(workers.written) == ROOM + CHUNKS


def test_a_disk_that_is_full_at_start_is_known_to_be() -> None:
    workers = Workers("second", used=CAPACITY)
    for number in range(5):
        workers.serve(number)
    assert workers.written == []


def test_room_that_workers_report_is_used() -> None:
    workers = Workers("second", used=CAPACITY)
    workers.serve(0)
    assert workers.written == []
    workers.used = 0  # the folder was emptied
    workers.step({})
    workers.serve(1)
    assert len(workers.written) == CHUNKS


def test_where_all_is_written_nobody_asks_about_room() -> None:
    workers = Workers("all", used=CAPACITY)
    for number in range(20):
        workers.serve(number)
    assert len(workers.written) == 20 * CHUNKS


def test_what_never_comes_again_soon_stays_off_a_full_disk() -> None:
    workers = Workers("adaptive")
    for number in range(60):
        workers.serve(number)
    assert ROOM < len(workers.written) <= 2 * ROOM, "until the rule has enough observations"
    assert len(workers.written) < 60 * CHUNKS / 2


def test_workers_that_say_nothing_about_their_tiers_are_believed_to_have_room() -> None:
    workers = Workers("second", used=CAPACITY)
    spec = KVSpec.uniform("m", layers=3, kv_heads=2, head_dim=32, dtype="float32")
    workers.scheduler.open([Offer(0, spec, (8,), (TierInfo("disk", True),))])
    assert workers.scheduler._plane is not None
    assert workers.scheduler._plane.admission.has_room(0)
