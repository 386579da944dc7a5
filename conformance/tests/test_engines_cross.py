"""Two attention backends of one engine stand in for two engines: one writes, the other reads, and vice versa."""

from lmcache_conformance.suites.cross import CrossTests, Side

FUSED = Side("lmcache_hf.testing.conformance:adapter", {"attn_implementation": "sdpa"})
EAGER = Side("lmcache_hf.testing.conformance:adapter", {"attn_implementation": "eager"})


class TestEagerReadsFused(CrossTests):
    writer, reader = FUSED, EAGER


class TestFusedReadsEager(CrossTests):
    writer, reader = EAGER, FUSED
