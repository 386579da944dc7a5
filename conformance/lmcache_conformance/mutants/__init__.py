"""Deliberately broken tiers, layouts, keys, caches and engine adapters: the suites must fail on every one of them.

A mutant is a subclass of a suite whose factory returns an implementation that is broken in exactly one way:

    @mutant(row="key exists with an empty value", project="Mooncake #3465")
    class MutantEmptyValue(TierTests):
        def open_tier(self, place, capacity):
            return ServesEmptyValues(place, capacity)

Mutants of engines are in packages of adapters, as entry points of group `lmcache.mutants`; `engine_failures` has what they
share. Class names begin with `Mutant`, so that ordinary runs never collect them. A module lists what cannot be built on a CPU
in `SKIPPED = (skip_row(row, reason), …)`. A mutant is killed if a test of its suite fails *by assertion*.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeVar

from lmcache_conformance.mutants.rows import ROWS

__all__ = ["BEYOND", "ROWS", "Mutant", "SkippedRow", "all_mutants", "mutant", "only", "skip_row", "skipped_rows"]

ENTRY_POINTS = "lmcache.mutants"
"""Entry point group under which an adapter registers its module of mutants."""

BEYOND = "beyond the table: "
"""Prefix of the row of a mutant that stands for no known failure."""

_MARK = "__lmcache_mutant__"
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Mutant:
    """One mutant.

    Attributes:
        name: `family.Class`, unique.
        row: the known failure it reproduces, one of `ROWS` (or a text that begins with `BEYOND`).
        project: where the failure occurred, e.g. `"LMCache #4463"`.
        suite: the class.
    """

    name: str
    row: str
    project: str
    suite: type

    @property
    def file(self) -> str:
        """Path of the source file, for `pytest FILE::CLASS`."""
        return str(importlib.import_module(self.suite.__module__).__file__)


@dataclass(frozen=True)
class SkippedRow:
    """A known failure that cannot be reproduced here, and why."""

    row: str
    reason: str


def mutant(*, row: str, project: str) -> Callable[[C], C]:
    """Declares a suite class a mutant.

    Raises:
        ValueError: `row` is not in `ROWS`, or the class name does not begin with `Mutant`.
    """
    _check(row)

    def declare(suite: C) -> C:
        if not suite.__name__.startswith("Mutant"):
            raise ValueError(f"a mutant's class name begins with 'Mutant', {suite.__name__!r} does not")
        name = f"{_family(suite.__module__)}.{suite.__name__}"
        setattr(suite, _MARK, Mutant(name, row, project, suite))
        return suite

    return declare


def only(*tests: Callable[..., None]) -> Callable[[C], C]:
    """Restricts a suite class to these tests of it: for mutants that no other test kills."""
    wanted = {test.__name__ for test in tests}

    def restrict(suite: C) -> C:
        for name in dir(suite):
            if name.startswith("test_") and name not in wanted:
                setattr(suite, name, None)
        return suite

    return restrict


def skip_row(row: str, reason: str) -> SkippedRow:
    """Declares that a row has no mutant, and why. Modules list these in `SKIPPED`."""
    _check(row)
    return SkippedRow(row, reason)


def all_mutants() -> list[Mutant]:
    """Returns every mutant of this package and of installed adapters, in order of definition."""
    found = []
    for name in _modules():
        module = importlib.import_module(name)
        mine = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
        found += [value.__dict__[_MARK] for value in mine if _MARK in value.__dict__]
    return found


def skipped_rows() -> list[SkippedRow]:
    """Returns every row that is skipped."""
    return [row for name in _modules() for row in getattr(importlib.import_module(name), "SKIPPED", ())]


def _modules() -> list[str]:
    here = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__) if module.name != "rows"]
    return sorted(here) + sorted(point.value for point in entry_points(group=ENTRY_POINTS))


def _family(module: str) -> str:
    """Returns the name of a module of this package, and the adapter of an adapter's module: `vllm` for `lmcache_vllm.…`."""
    package, _, name = module.rpartition(".")
    return name if package == __name__ else module.partition(".")[0].removeprefix("lmcache_")


def _check(row: str) -> None:
    if row not in ROWS and not row.startswith(BEYOND):
        near = difflib.get_close_matches(row, ROWS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no known failure is called {row!r}; did you mean {near!r}? They are in mutants/rows.py")
