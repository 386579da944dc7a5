"""The control plane: its guarantees while reports are lost, duplicated and late, and random histories of it."""

from lmcache_conformance.suites.index import IndexTests
from lmcache_conformance.suites.index_machine import IndexMachineTests


class TestIndex(IndexTests):
    """See `IndexTests`."""


class TestHistories(IndexMachineTests):
    """See `IndexMachineTests`."""
