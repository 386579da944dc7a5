"""The tiers below the arena that a configuration asks for."""

from __future__ import annotations

from lmcache.config import Config
from lmcache.errors import TierError
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.tiers.base import Tier


def open_tiers(config: Config, metrics: Metrics, log: Throttle) -> list[Tier]:
    """Open them, nearest first. One that cannot be opened is left out, counted and told.

    Raises:
        TierError: with `config.strict`, instead of leaving it out.
    """
    if config.disk_path is None:
        return []
    from lmcache.tiers.disk import DiskTier

    try:
        return [DiskTier(config.disk_path, config.disk_bytes)]
    except TierError as error:
        if config.strict:
            raise
        metrics.failed("open", "disk")
        log.warning("tier-disabled", tier="disk", reason=error)
        return []
