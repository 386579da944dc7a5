"""Which object leaves an arena next. Policies only *order* what is resident; the arena decides what may really go.

adaptive           LRU; what was used seldom goes earlier where ghost caches show a gain, see `lmcache.control.eviction.adaptive`
lru, lfu, s3fifo   see `lmcache.control.eviction.classic`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lmcache.config.settings import named
from lmcache.control.eviction.adaptive import Adaptive
from lmcache.control.eviction.base import Policy, Recent, Tracked
from lmcache.control.eviction.classic import Lfu, Lru, S3Fifo

PolicyFactory = Callable[[int], Policy]
"""Makes the policy of an arena of that many objects."""

POLICIES: Mapping[str, PolicyFactory] = MappingProxyType(
    {"lru": Lru, "lfu": Lfu, "s3fifo": S3Fifo, "adaptive": Adaptive}
)


def policy_factory(name: str) -> PolicyFactory:
    """The policy called `name`; `ConfigError` names the nearest one if there is none."""
    return named(name, POLICIES, "eviction policy")


def hears(policy: Policy) -> bool:
    """Whether this policy learns from what is asked for, so that it has to be told."""
    return getattr(type(policy), "asked", Policy.asked) is not Policy.asked


__all__ = [
    "POLICIES",
    "Adaptive",
    "Lfu",
    "Lru",
    "Policy",
    "PolicyFactory",
    "Recent",
    "S3Fifo",
    "Tracked",
    "hears",
    "policy_factory",
]
