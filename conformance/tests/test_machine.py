"""Random histories of our cache."""

from __future__ import annotations

from lmcache_conformance.cachemachine import CacheMachineTests


class TestHistories(CacheMachineTests):
    pass
