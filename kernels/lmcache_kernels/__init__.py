"""Gather and scatter between an engine's paged KV and contiguous objects. Knows tensors, nothing else."""
