"""Random histories of the cache engine: the target is run here as it is."""

from lmcache_conformance.targets.cache import TestHistories

__all__ = ["TestHistories"]
