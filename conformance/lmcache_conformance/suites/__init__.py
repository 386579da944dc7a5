"""The tests that third parties subclass: caches, tiers, layouts, names, indexes, kernels, engines across engines."""
