"""The test suites that third parties subclass: caches, tiers, layouts, keys, indexes, kernels, cross-engine sharing."""
