"""Moved: `lmcache_conformance.indexlab`."""

from lmcache_conformance.indexlab import *  # noqa: F403
