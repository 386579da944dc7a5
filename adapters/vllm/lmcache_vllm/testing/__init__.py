"""Test support of this adapter: its description for the conformance suite, sessions, broken connectors, mutants."""
