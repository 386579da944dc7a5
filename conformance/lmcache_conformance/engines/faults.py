from lmcache_conformance.engines.base import EngineBase


class FaultTests(EngineBase): ...
