"""Skips tests of capabilities that the class under test does not claim, with the reason in the report."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lmcache_conformance.contract import EngineAdapter
from lmcache_conformance.runner.claims import UnknownCapabilityError, unclaimed
from lmcache_conformance.runner.discover import DiscoveryError, NotInstalledError, find_adapter
from lmcache_conformance.runner.marks import REQUIRES

NO_ADAPTER = "no adapter was chosen: --lmcache-adapter NAME"


def apply_claims(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Marks the tests to be skipped.

    A class claims its attribute `capabilities`. A class with an attribute `adapter` and no capabilities of its own (an
    engine suite) claims those of that adapter or, if it is None, of the one given by `--lmcache-adapter`.

    Raises:
        pytest.UsageError: a test requires an unknown capability, or the adapter cannot be found.
    """
    adapters: dict[str, EngineAdapter] = {}
    for item in items:
        cls = getattr(item, "cls", None)
        if cls is None:
            continue
        reason = None
        capabilities = getattr(cls, "capabilities", None)
        if hasattr(cls, "adapter"):
            adapter, reason = _adapter(config, cls.adapter, adapters)
            if capabilities is None and adapter is not None:
                capabilities = adapter.capabilities
        reason = reason or _not_claimed(item, capabilities)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _adapter(
    config: pytest.Config, own: object, known: dict[str, EngineAdapter]
) -> tuple[EngineAdapter | None, str | None]:
    """Returns the adapter, and why its tests cannot run (None if they can)."""
    reference = own or config.option.lmcache_adapter
    if not reference:
        return None, NO_ADAPTER
    if not isinstance(reference, str):
        raise pytest.UsageError(f"`adapter` of an engine suite must be a name (a string), not {reference!r}")
    if reference not in known:
        try:
            known[reference] = find_adapter(reference)
        except NotInstalledError as error:
            return None, f"not installed here: {error}"
        except DiscoveryError as error:
            raise pytest.UsageError(str(error)) from None
    adapter = known[reference]
    missing = adapter.why_not()
    return adapter, None if missing is None else f"not installed here: {missing}"


def _not_claimed(item: pytest.Item, capabilities: object) -> str | None:
    required = [str(name) for mark in item.iter_markers(REQUIRES) for name in mark.args]
    if not required:
        return None
    if capabilities is None:
        return f"not claimed: {', '.join(required)} (the class has no `capabilities`)"
    try:
        missing = unclaimed(capabilities, required)
    except UnknownCapabilityError as error:
        raise pytest.UsageError(f"{item.nodeid}: {error}") from None
    return f"not claimed: {', '.join(missing)}" if missing else None
