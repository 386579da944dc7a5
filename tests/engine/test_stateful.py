"""Random histories of the cache, longer than in the conformance suite."""

from __future__ import annotations

from lmcache_conformance.suites.cache_machine import CacheMachineTests


class TestHistories(CacheMachineTests):
    machine_examples = 120
