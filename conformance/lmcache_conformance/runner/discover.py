"""Finds what can be tested: bundled and third-party engine adapters and targets.

An adapter is named by its entry point (group `lmcache.adapters`), or as `module:attribute`, which needs no installation.
A target is a module of tests: one in `lmcache_conformance.targets`, or one that a package registers in the entry point
group `lmcache.conformance`, for a tier under the name `tier.NAME`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from lmcache_conformance.contract import ENTRY_POINTS, EngineAdapter

TARGET_ENTRY_POINTS = "lmcache.conformance"
"""Entry point group of modules with tests."""

ENGINE_TARGET = "engine"
"""The target that runs once per adapter."""

OUR_TIERS = ("memory", "disk", "dram")
_TIER_PREFIX = "tier."
_NEEDED = ("name", "capabilities", "why_not", "open")


class DiscoveryError(ValueError):
    """Nothing has that name, or the object of that name is of the wrong kind. The message lists the existing names."""


class NotInstalledError(DiscoveryError):
    """The adapter is installed, but the engine that it imports is not."""


@dataclass(frozen=True)
class Target:
    """A module of tests. `--tier` and `--adapter` select by `kind`."""

    name: str
    module: str
    kind: Literal["engine", "tier", "other"]


def adapter_names() -> list[str]:
    """Returns the names of the installed adapters."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def find_adapter(reference: str) -> EngineAdapter:
    """Returns the adapter named by `reference` (entry point name or `module:attribute`).

    Raises:
        DiscoveryError: there is none, it cannot be imported, or it lacks attributes of `EngineAdapter`.
        NotInstalledError: the engine that it imports is not installed.
    """
    if ":" in reference:
        point = EntryPoint(reference, reference, ENTRY_POINTS)
    else:
        points = {p.name: p for p in entry_points(group=ENTRY_POINTS)}
        if reference not in points:
            raise DiscoveryError(_unknown("adapter", reference, sorted(points)) + "; or name one as module:attribute")
        point = points[reference]
    return _load(point, reference)


def _load(point: EntryPoint, reference: str) -> EngineAdapter:
    where = f"adapter {reference!r}" + ("" if point.value == reference else f" ({point.value})")
    try:
        found = point.load()
    except ModuleNotFoundError as error:
        own = point.value.partition(":")[0].partition(".")[0]
        kind = DiscoveryError if (error.name or own).partition(".")[0] == own else NotInstalledError
        raise kind(f"{where} cannot be imported: {error}") from error
    except ImportError as error:
        raise DiscoveryError(f"{where} cannot be imported: {error}") from error
    except AttributeError as error:
        raise DiscoveryError(f"{where} is not in its module: {error}") from error
    if isinstance(found, type):
        found = found()
    missing = [name for name in _NEEDED if not hasattr(found, name)]
    if missing:
        raise DiscoveryError(f"{where} is not an EngineAdapter: it lacks {', '.join(missing)}")
    adapter: EngineAdapter = found
    return adapter


def targets() -> list[Target]:
    """Returns all targets: the bundled ones first, then those of installed packages, sorted by name."""
    from lmcache_conformance import targets as ours

    names = sorted(m.name for m in pkgutil.iter_modules(ours.__path__) if not m.name.startswith("_"))
    found = [Target(name, f"{ours.__name__}.{name}", _kind(name)) for name in names]
    for point in sorted(entry_points(group=TARGET_ENTRY_POINTS), key=lambda p: p.name):
        tier = point.name.startswith(_TIER_PREFIX)
        found.append(Target(point.name.removeprefix(_TIER_PREFIX), point.value, "tier" if tier else "other"))
    return found


def choose_targets(all_targets: Sequence[Target], names: Sequence[str], *, kind: str | None = None) -> list[Target]:
    """Returns the targets called `names`, in that order; restricted to one `kind` if given.

    Raises:
        DiscoveryError: there is none of that name.
    """
    by_name = {t.name: t for t in all_targets if kind is None or t.kind == kind}
    for name in names:
        if name not in by_name:
            raise DiscoveryError(_unknown(kind or "target", name, sorted(by_name)))
    return [by_name[name] for name in names]


def file_of(target: Target) -> str:
    """Returns the path of a target's source file, without importing it.

    Raises:
        DiscoveryError: there is no such module.
    """
    try:
        spec = importlib.util.find_spec(target.module)
    except ImportError as error:
        raise DiscoveryError(f"target {target.name!r}: module {target.module} cannot be found: {error}") from error
    if spec is None or spec.origin is None:
        raise DiscoveryError(f"target {target.name!r}: there is no module {target.module}")
    return spec.origin


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns the end of a sentence about an unknown `name`: `; did you mean 'disk'?`, or `.` if no name is similar."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _unknown(what: str, name: str, names: Sequence[str]) -> str:
    return f"unknown {what} {name!r}{nearest(name, names)} Available: {', '.join(names) or 'none'}"


def _kind(name: str) -> Literal["engine", "tier", "other"]:
    if name == ENGINE_TARGET:
        return "engine"
    return "tier" if name in OUR_TIERS else "other"
