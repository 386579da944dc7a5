"""More random histories of the index than the conformance suite runs."""

from __future__ import annotations

from lmcache_conformance.suites.index_machine import IndexMachineTests


class TestHistories(IndexMachineTests):
    machine_examples = 300
