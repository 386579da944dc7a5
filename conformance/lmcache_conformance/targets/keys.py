"""The keys of `lmcache.keys`."""

from lmcache_conformance.suites.keys import KeyTests


class TestKeys(KeyTests):
    """See `KeyTests`."""
