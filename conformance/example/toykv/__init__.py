"""A toy engine and a toy tier, proven by the LMCache conformance suite."""
