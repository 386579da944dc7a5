"""The plain-torch movers equal naive arithmetic."""

from __future__ import annotations

from lmcache_conformance.kernels import KernelTests


class TestReference(KernelTests):
    pass
