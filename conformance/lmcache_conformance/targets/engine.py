"""The engine adapter named by `--lmcache-adapter`."""

from lmcache_conformance.engines import EngineTests


class TestEngine(EngineTests):
    """See `EngineTests`."""
