"""The control plane: what it promises while reports are lost, doubled and late."""

from lmcache_conformance.index import IndexTests


class TestIndex(IndexTests):
    """See `IndexTests`."""
