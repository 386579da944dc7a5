"""Test support of this adapter: adapters for the conformance suite, sessions, instrumented backends, preloading."""
