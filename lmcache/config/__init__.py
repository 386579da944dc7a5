"""Settings: how they are declared, what they are, and what of this machine their defaults depend on."""

from lmcache.config.config import PREFIX, Config

__all__ = ["PREFIX", "Config"]
