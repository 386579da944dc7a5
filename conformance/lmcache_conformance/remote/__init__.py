"""Engines in processes of their own: the test's side, the child's side, and the messages between them."""
