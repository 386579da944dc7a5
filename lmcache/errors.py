"""Typed errors. Each message contains the problem, the offending value, and what to do.

They are raised for *invalid calls* (bad configuration, tensors that contradict the spec), before any data is moved. Failures
inside the cache at run time (a lost file, a full disk) never raise: they are a miss, a counter and a log line.
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base class of all errors raised by this package."""


class ConfigError(LMCacheError, ValueError):
    """A setting is unknown, malformed or cannot be met on this machine."""


class SpecError(LMCacheError, ValueError):
    """A `KVSpec` is inconsistent, or tensors contradict their spec."""


class LayoutError(LMCacheError, ValueError):
    """An axis string is invalid or does not match the tensors it describes."""


class SlotError(LMCacheError, ValueError):
    """Slots are out of range, duplicated, or of the wrong number or type."""


class TokenError(LMCacheError, ValueError):
    """Token ids are negative, larger than 32 bits, or not integers."""


class FormatError(LMCacheError, ValueError):
    """Bytes are not a valid object of this format; the message has the reason."""


class FormatVersionError(FormatError):
    """The object has a newer format version than this release can read."""


class TierError(LMCacheError, OSError):
    """A tier cannot be opened, or an operation on the whole tier failed."""
