"""The command behind `lmcache conformance`: find targets, run them in child processes, add up, report."""
