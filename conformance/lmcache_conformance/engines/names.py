from lmcache_conformance.engines.base import EngineBase


class NameTests(EngineBase): ...
