"""One engine reads what another has written. Two attention backends of one engine stand in for two engines."""

from lmcache_conformance.suites.cross import CrossTests, Side

FUSED = Side("hf", {"attn_implementation": "sdpa"})
EAGER = Side("hf", {"attn_implementation": "eager"})


class TestEagerReadsFused(CrossTests):
    """See `CrossTests`."""

    writer, reader = FUSED, EAGER


class TestFusedReadsEager(CrossTests):
    """See `CrossTests`."""

    writer, reader = EAGER, FUSED
