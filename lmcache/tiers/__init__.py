"""Tiers below the arena. One tier a file; all of them pass the same suite of tests."""
