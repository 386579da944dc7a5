"""One engine reads what another one has written, as far as both are here: two numerics of one engine stand in for two."""

from lmcache_conformance.suites.cross import CrossTests, Side

FUSED = Side("hf", {"attn_implementation": "sdpa"})
EAGER = Side("hf", {"attn_implementation": "eager"})


class TestEagerReadsFused(CrossTests):
    """See `CrossTests`."""

    writer, reader = FUSED, EAGER


class TestFusedReadsEager(CrossTests):
    """See `CrossTests`."""

    writer, reader = EAGER, FUSED
