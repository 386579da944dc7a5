"""The plain-torch movers equal naive arithmetic: the target is run here as it is."""

from lmcache_conformance.targets.kernels import TestReference

__all__ = ["TestReference"]
