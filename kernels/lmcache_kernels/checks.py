class CopyError(ValueError):
    """A copy that cannot be meant."""
