"""Engines in child processes: the test's side, the child's side, and the messages between them."""
