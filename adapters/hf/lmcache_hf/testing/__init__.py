"""Test support of this adapter: the adapter for the conformance suite, sessions, deliberately broken engines, mutants."""
