"""Two numerics of one engine stand in for two engines: fused attention writes, eager attention reads, and back."""

from lmcache_conformance.suites.cross import CrossTests, Side

FUSED = Side("lmcache_hf.testing.conformance:adapter", {"attn_implementation": "sdpa"})
EAGER = Side("lmcache_hf.testing.conformance:adapter", {"attn_implementation": "eager"})


class TestEagerReadsFused(CrossTests):
    writer, reader = FUSED, EAGER


class TestFusedReadsEager(CrossTests):
    writer, reader = EAGER, FUSED
