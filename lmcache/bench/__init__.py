"""Measurements: each is a function that returns plain results; `lmcache bench` shows them."""
