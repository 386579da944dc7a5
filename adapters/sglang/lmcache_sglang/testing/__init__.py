"""What tests need of this adapter: the adapters for the conformance suite, sessions, observed interfaces."""
