"""Benchmarks: functions that return plain results, which `lmcache bench` prints."""
