"""The names of `lmcache.keys`."""

from lmcache_conformance.keys import KeyTests


class TestKeys(KeyTests):
    """See `KeyTests`."""
