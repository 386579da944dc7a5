"""Opens the index under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache.control import Index
from lmcache.spec import HitRule
from lmcache_conformance.labs.indexlab import CHUNK


class IndexFactory:
    """What a subclass overrides."""

    def open_index(self, groups: Sequence[tuple[str, HitRule]], slots: Sequence[int], **settings: Any) -> Index:
        """Opens an index with chunks of `CHUNK` tokens."""
        return Index(groups, CHUNK, slots, **settings)
