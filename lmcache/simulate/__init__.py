"""Simulates a cache: runs recorded or published request traces through the real control plane, without KV data."""
