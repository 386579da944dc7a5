"""Conformance test suites for engine adapters, tiers, layouts and kernels, including third-party ones."""
