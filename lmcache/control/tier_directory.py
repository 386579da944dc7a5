"""The directory of a tier: which objects it is assumed to hold. Every load verifies; an object that is not there is a miss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lmcache.plan import Name

_NOTHING: Mapping[bytes, int] = MappingProxyType({})


class TierDirectory:
    """Contents of one tier: per namespace and group, digest → bit mask of the ranks that have their part.

    Attributes:
        changes: grows with every change.
        notice: called with (True, namespace, group, digest) when an object becomes usable on all ranks, with False when it
            ceases to be.
    """

    __slots__ = ("_full", "_masks", "changes", "notice")

    def __init__(self, ranks: int) -> None:
        self._full = (1 << ranks) - 1
        self.changes = 0
        self.notice: Callable[[bool, bytes, int, bytes], None] | None = None
        self._masks: dict[tuple[bytes, int], dict[bytes, int]] = {}

    def masks(self, namespace: bytes, group: int) -> Mapping[bytes, int]:
        """Returns digest → bit mask of ranks, for lookups of many digests; an object is usable when all ranks have it."""
        return self._masks.get((namespace, group), _NOTHING)

    def has(self, namespace: bytes, group: int, digest: bytes) -> bool:
        """Whether every rank has the object."""
        return self.masks(namespace, group).get(digest) == self._full

    def add(self, name: Name, rank: int) -> None:
        """Records that `rank` has its part of the object."""
        masks = self._masks.setdefault((name.namespace, name.group), {})
        before = masks.get(name.chain, 0)
        masks[name.chain] = after = before | 1 << rank
        self.changes += after != before
        if self.notice is not None and after == self._full != before:
            self.notice(True, name.namespace, name.group, name.chain)

    def remove(self, name: Name, rank: int | None = None) -> bool:
        """Records that `rank` (None: no rank) has it any more; returns whether that is a change."""
        key = (name.namespace, name.group)
        masks = self._masks.get(key)
        before = masks.get(name.chain, 0) if masks else 0
        if masks is None or not before:
            return False
        after = 0 if rank is None else before & ~(1 << rank)
        self.changes += after != before
        if after:
            masks[name.chain] = after
        else:
            del masks[name.chain]
            if not masks:
                del self._masks[key]
        if self.notice is not None and before == self._full != after:
            self.notice(False, name.namespace, name.group, name.chain)
        return after != before

    def clear(self, namespace: bytes | None) -> None:
        """Removes everything (of one namespace)."""
        self.changes += 1
        for key in [k for k in self._masks if namespace is None or k[0] == namespace]:
            masks = self._masks.pop(key)
            for digest in (d for d, mask in masks.items() if self.notice is not None and mask == self._full):
                self.notice(False, *key, digest)  # type: ignore[misc]  # it is not None

    def __len__(self) -> int:
        """Number of objects usable on every rank."""
        return sum(sum(mask == self._full for mask in masks.values()) for masks in self._masks.values())
