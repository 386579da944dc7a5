"""Typed errors. Each message says what was wrong, with which value, and what to do.

They are raised for *wrong calls* (bad configuration, tensors that contradict the spec), before anything moved. What goes
wrong inside the cache at run time (a lost file, a full disk) is never an exception: it is a miss, a counter and a log line.
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base of all errors this package raises."""


class ConfigError(LMCacheError, ValueError):
    """A setting is unknown, malformed or impossible on this machine."""


class SpecError(LMCacheError, ValueError):
    """A `KVSpec` contradicts itself, or tensors contradict their spec."""


class LayoutError(LMCacheError, ValueError):
    """An axis string makes no sense, or does not fit the tensors it describes."""


class SlotError(LMCacheError, ValueError):
    """Slots are out of range, duplicated, of the wrong length or type."""


class TokenError(LMCacheError, ValueError):
    """Token ids are negative, beyond 32 bits, or not integers."""


class FormatError(LMCacheError, ValueError):
    """Bytes are not an object of this format; the message says in which way."""


class FormatVersionError(FormatError):
    """The object was written by a newer format version than this release reads."""


class TierError(LMCacheError, OSError):
    """A tier cannot be opened where it was asked to be."""
