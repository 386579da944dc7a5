"""Longer random histories of the cache than the conformance suite takes time for."""

from __future__ import annotations

from lmcache_conformance.suites.cache_machine import CacheMachineTests


class TestHistories(CacheMachineTests):
    machine_examples = 120
