"""A toy engine and a toy tier, tested by the LMCache conformance suite."""
