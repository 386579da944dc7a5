"""The reference kernels pass the kernel suite: runs the target of the conformance command unchanged."""

from lmcache_conformance.targets.kernels import TestReference

__all__ = ["TestReference"]
