"""The vLLM adapter passes the engine suite, and shares KV with Hugging Face transformers where it is asked to."""

from lmcache_conformance.cross import CrossTests, Side
from lmcache_conformance.engines import EngineTests

VLLM = Side("lmcache_vllm.conformance:adapter")
HF = Side("lmcache_hf.conformance:adapter")


class TestVLLM(EngineTests):
    adapter = "lmcache_vllm.conformance:adapter"


class TestHFReadsVLLM(CrossTests):
    writer, reader = VLLM, HF


class TestVLLMReadsHF(CrossTests):
    writer, reader = HF, VLLM
