"""The vLLM adapter passes the engine suite, and shares KV with Hugging Face transformers if configured to."""

from lmcache_conformance.engines import EngineTests
from lmcache_conformance.suites.cross import CrossTests, Side

VLLM = Side("lmcache_vllm.testing.conformance:adapter")
HF = Side("lmcache_hf.testing.conformance:adapter")


class TestVLLM(EngineTests):
    adapter = "lmcache_vllm.testing.conformance:adapter"


class TestHFReadsVLLM(CrossTests):
    writer, reader = VLLM, HF


class TestVLLMReadsHF(CrossTests):
    writer, reader = HF, VLLM
