"""Turns the user's selection of targets and adapters into jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmcache_conformance.contract import Level
from lmcache_conformance.runner.discover import (
    ENGINE_TARGET,
    DiscoveryError,
    Target,
    adapter_names,
    choose_targets,
    file_of,
    nearest,
    targets,
)
from lmcache_conformance.runner.run import Job, Limits
from lmcache_conformance.runner.xfails import read_xfails

QUICK_LIMITS = Limits(test=300.0, start=600.0, job=1200.0)
FULL_LIMITS = Limits(test=1800.0, start=600.0, job=7200.0)


@dataclass(frozen=True)
class Selection:
    """What to run. Without any name, everything runs.

    Attributes:
        adapters: engine adapters, by entry point or `module:attribute`.
        tiers, targets: by name.
        levels: restricts the run to tests of these levels.
        budget: thoroughness of the tests.
        seed: Hypothesis' seed, for all tests.
        xfails: file with the list of known failures.
    """

    adapters: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    budget: Literal["quick", "full"] = "quick"
    seed: int = 0
    xfails: Path | None = None

    @property
    def limits(self) -> Limits:
        """Time limits of the budget."""
        return FULL_LIMITS if self.budget == "full" else QUICK_LIMITS

    def options(self) -> tuple[str, ...]:
        """Options for each child pytest."""
        found = [f"--lmcache-budget={self.budget}", f"--hypothesis-seed={self.seed}"]
        if self.levels:
            found.append(f"--lmcache-level={','.join(self.levels)}")
        if self.xfails is not None:
            found.append(f"--lmcache-xfails={self.xfails.absolute()}")
        return tuple(found)


def jobs_for(selection: Selection) -> list[Job]:
    """Returns one job per target, and one per adapter.

    Raises:
        DiscoveryError: a name is unknown; the message suggests the nearest one.
        XfailError: the list of known failures is malformed.
    """
    known = [level.value for level in Level]
    for level in selection.levels:
        if level not in known:
            raise DiscoveryError(f"unknown level {level!r}{nearest(level, known)} Available: {', '.join(known)}")
    if selection.xfails is not None:
        read_xfails(selection.xfails)  # to report errors once, here, rather than in every child
    found = targets()
    chosen = choose_targets(found, selection.tiers, kind="tier") + choose_targets(found, selection.targets)
    if not (selection.adapters or selection.tiers or selection.targets):
        chosen = list(found)
    engine = next((t for t in found if t.name == ENGINE_TARGET), None)
    adapters: Sequence[str] = selection.adapters
    if engine in chosen and not adapters:
        adapters = adapter_names()
    jobs = [Job(t.name, file_of(t), selection.options()) for t in dict.fromkeys(chosen) if t != engine]
    if adapters and engine is None:
        raise DiscoveryError(f"adapters cannot be tested: there is no target {ENGINE_TARGET!r} in this release")
    rows = {job.row for job in jobs}
    return jobs + [
        _adapter_job(engine, name, selection, rows) for name in dict.fromkeys(adapters) if engine is not None
    ]


def _adapter_job(engine: Target, name: str, selection: Selection, taken: set[str]) -> Job:
    if ":" not in name and name not in adapter_names():
        names = adapter_names()
        raise DiscoveryError(
            f"unknown adapter {name!r}{nearest(name, names)} Installed: {', '.join(names) or 'none'}; "
            "or name one as module:attribute"
        )
    row = f"adapter {name}" if name in taken else name
    return Job(row, file_of(engine), (f"--lmcache-adapter={name}", *selection.options()))
