"""The SGLang adapter passes the engine suite."""

from lmcache_conformance.engines import EngineTests


class TestSGLang(EngineTests):
    adapter = "lmcache_sglang.conformance:adapter"
