"""What the class under test claims, and which of a test's requirements it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache_conformance.runner.discover import nearest


class UnknownCapabilityError(ValueError):
    """A test requires something that the capabilities record has no field for: most likely a misspelling."""


def unclaimed(capabilities: object, required: Sequence[str]) -> list[str]:
    """Those of `required` that are not claimed, in words for a report.

    A requirement is a field's name, claimed if its value is true, or `field=value`, claimed if the field holds it or is it:
    `"restart"`, `"dtypes=bfloat16"`, `"tensor_parallel=2"`.

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
