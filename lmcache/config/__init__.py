"""Settings: their declaration (`settings`), their values (`config`), and the machine facts defaults depend on (`machine`)."""

from lmcache.config.config import PREFIX, Config

__all__ = ["PREFIX", "Config"]
