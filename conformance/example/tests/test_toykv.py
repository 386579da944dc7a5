"""The tests of tier and engine under plain pytest."""

from toykv.checks import TestSqlite

from lmcache_conformance.engines import EngineTests

__all__ = ["TestSqlite", "TestToy"]


class TestToy(EngineTests):
    adapter = "toy"
