"""One engine adapter, the one that `--lmcache-adapter` names."""

from lmcache_conformance.engines import EngineTests


class TestEngine(EngineTests):
    """See `EngineTests`."""
