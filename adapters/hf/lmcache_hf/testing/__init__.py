"""What tests need of this adapter: the adapter for the conformance suite, sessions, broken engines, mutants."""
