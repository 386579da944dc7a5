"""The implementation of `lmcache conformance`: finds targets, runs them in child processes, reports the results."""
