"""Random histories of the cache engine: runs the target of the conformance command unchanged."""

from lmcache_conformance.targets.cache import TestHistories

__all__ = ["TestHistories"]
