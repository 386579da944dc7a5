"""Our index keeps the contract of control planes: the target is run here as it is."""

from lmcache_conformance.targets.index import TestIndex

__all__ = ["TestIndex"]
