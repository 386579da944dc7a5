"""The suites bound to what this package ships: what `lmcache conformance` runs. One target a module."""
