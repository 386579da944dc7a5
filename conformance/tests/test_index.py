"""Our index keeps the contract of control planes."""

from __future__ import annotations

from lmcache_conformance.index import IndexTests


class TestIndex(IndexTests):
    pass
