"""The reference kernels."""

from lmcache_conformance.suites.kernels import KernelTests


class TestReference(KernelTests):
    """See `KernelTests`."""
