"""The contract of every engine that uses the cache, as tests. Name your adapter and run pytest:

    class TestMyEngine(EngineTests):
        adapter = "my-engine"      # its entry point, or "module:attribute"

Each test runs for every model and dtype that the adapter claims, with engines in child processes; tests of unclaimed
capabilities are skipped with that reason. The oracle is the same engine recomputing in the same split, a fresh engine
with an empty cache, and the raw files; never the cache itself.
"""

from __future__ import annotations

from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.faults import FaultTests
from lmcache_conformance.engines.names import NameTests
from lmcache_conformance.engines.parallel import ParallelTests
from lmcache_conformance.engines.traffic import TrafficTests
from lmcache_conformance.engines.values import ValueTests

__all__ = ["EngineTests"]


class EngineTests(ParallelTests, FaultTests, TrafficTests, NameTests, ValueTests, EngineBase):
    """The whole engine suite; pytest runs the last base's tests first. See `EngineBase` for attributes to override."""
