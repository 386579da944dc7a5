"""Settings: their declaration (`settings`), their values (`config`), where they are read from (`environment`, `files`), and the
machine facts defaults depend on (`machine`).
"""

from lmcache.config.config import Checksums, Config
from lmcache.config.environment import PREFIX

__all__ = ["PREFIX", "Checksums", "Config"]
