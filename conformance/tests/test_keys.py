"""Our own names keep the contract of names. Their exact values are frozen in tests/core/test_keys.py."""

from __future__ import annotations

from lmcache_conformance.keys import KeyTests


class TestNames(KeyTests):
    pass
