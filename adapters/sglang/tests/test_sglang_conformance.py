"""The SGLang adapter passes the engine suite."""

import pytest

from lmcache_conformance.engines import EngineTests
from lmcache_sglang.conformance import adapter as sglang


@pytest.mark.slow
class TestSGLang(EngineTests):
    adapter = "lmcache_sglang.conformance:adapter"
    capabilities = sglang.capabilities
