"""What every engine with our cache under it must do, as tests. Name your adapter and run pytest:

    class TestMyEngine(EngineTests):
        adapter = "my-engine"      # its entry point, or "module:attribute"

Each test runs on every model and dtype that the adapter claims, in engines that live in processes of their own; what is
not claimed is skipped, with that reason. The oracle is the same engine recomputing in the same split, a fresh engine that
has cached nothing, and the raw files; never the cache.
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
    """All of it; pytest runs the last base's tests first. Attributes say what the engine under test is; see `EngineBase`."""
