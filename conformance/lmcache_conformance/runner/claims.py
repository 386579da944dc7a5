"""Compares the capabilities that a test requires with those that the class under test claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache_conformance.runner.discover import nearest


class UnknownCapabilityError(ValueError):
    """A test requires a capability that is not a field of the capabilities record, most likely a misspelling."""


def unclaimed(capabilities: object, required: Sequence[str]) -> list[str]:
    """Returns those of `required` that are not claimed.

    A requirement is a field's name, which is claimed if its value is true, or `field=value`, which is claimed if the field
    contains or equals the value: `"restart"`, `"dtypes=bfloat16"`, `"tensor_parallel=2"`.

    Raises:
        UnknownCapabilityError: `capabilities` has no such field.
    """
    return [name for name in required if not _claimed(capabilities, name)]


def _claimed(capabilities: object, requirement: str) -> bool:
    name, equals, wanted = requirement.partition("=")
    if not hasattr(capabilities, name):
        fields = [field for field in dir(capabilities) if not field.startswith("_")]
        raise UnknownCapabilityError(f"{type(capabilities).__name__} has no capability {name!r}{nearest(name, fields)}")
    value: Any = getattr(capabilities, name)
    if not equals:
        return bool(value)
    values = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    return wanted in {str(v) for v in values}
