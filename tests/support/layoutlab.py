"""Moved: `lmcache_conformance.layoutlab`."""

from lmcache_conformance.layoutlab import *  # noqa: F403
