"""The Hugging Face adapter passes the engine suite."""

from lmcache_conformance.engines import EngineTests


class TestHF(EngineTests):
    adapter = "lmcache_hf.testing.conformance:adapter"
