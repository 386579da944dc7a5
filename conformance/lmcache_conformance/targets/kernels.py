"""The reference kernels."""

from lmcache_conformance.kernels import KernelTests


class TestReference(KernelTests):
    """See `KernelTests`."""
