"""The suites applied to this package's own components, as run by `lmcache conformance`. One target per module."""
