"""Tiers: where objects are kept below the arena. One file per tier; every tier passes the same conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.errors import TierError

if TYPE_CHECKING:
    from lmcache.config import Config
    from lmcache.observe.log import Throttle
    from lmcache.observe.metrics import Metrics
    from lmcache.tiers.base import Tier

__all__ = ["open_tiers"]


def open_tiers(config: Config, metrics: Metrics, log: Throttle) -> list[Tier]:
    """Opens the configured tiers, nearest first. A tier that cannot be opened is left out, counted and logged.

    Raises:
        TierError: a tier cannot be opened and `config.strict` is set.
    """
    if config.disk_path is None:
        return []
    from lmcache.tiers.disk import DiskTier  # heavy, and unneeded without a disk tier

    try:
        is_default = config.source("disk_bytes") == "default"
        return [DiskTier(config.disk_path, config.disk_bytes, capacity_is_default=is_default)]
    except TierError as error:
        if config.strict:
            raise
        metrics.failed("open", "disk")
        log.warning("tier-disabled", tier="disk", reason=error)
        return []
