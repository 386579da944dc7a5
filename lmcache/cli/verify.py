"""`lmcache verify`: verifies every byte of every file of the disk tier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache.cli.output import JsonOption, PathOption, disk_folder, human_bytes, print_json, print_line
from lmcache.errors import FormatError, FormatVersionError

if TYPE_CHECKING:
    from lmcache.keys import ObjectId
    from lmcache.tiers.folder import Entry


@dataclass(frozen=True)
class Problem:
    """A file and its defect."""

    file: str
    reason: str


@dataclass
class Verdict:
    """The outcome. `newer`: files of a newer format, which cannot be verified and are never deleted."""

    checked: int = 0
    bytes: int = 0
    bad: list[Problem] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)
    newer: list[Problem] = field(default_factory=list)
    deleted: int = 0

    @property
    def ok(self) -> bool:
        """Whether no file is damaged or unreadable."""
        return not self.bad and not self.unreadable


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(verify)


def verify(
    path: PathOption = None,
    delete_bad: Annotated[bool, typer.Option("--delete-bad", help="Delete damaged files.")] = False,
    json: JsonOption = False,
) -> None:
    """Verify header, length and checksums of every file. Engines may use the folder at the same time.

    Exit status 1 if a file is damaged or cannot be read, even if it was then deleted.

    \b
    Examples:
      lmcache verify
      lmcache verify --path /mnt/nvme/kv --delete-bad
      lmcache verify --json
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from lmcache.tiers.folder import Passed, walk

    folder = disk_folder(path)
    passed = Passed()
    entries = [entry for entry in walk(str(folder / "objects"), passed=passed) if not entry.temp]
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("verify", total=sum(entry.size for entry in entries))
        verdict, ids = check(entries, lambda nbytes: progress.advance(bar, nbytes))
    verdict.unreadable += [Problem(str(e.filename), e.strerror or str(e)) for e in passed.errors]
    if delete_bad and ids:
        verdict.deleted = _delete(folder, ids)
    if json:
        print_json({"path": str(folder), "ok": verdict.ok, **asdict(verdict)})
    else:
        for title, problems in (
            ("bad", verdict.bad),
            ("unreadable", verdict.unreadable),
            ("newer format", verdict.newer),
        ):
            for problem in problems:
                print_line(f"{title}: {problem.file}: {problem.reason}")
        done = f", {verdict.deleted} deleted" if verdict.deleted else ""
        print_line(
            f"{verdict.checked:,} files, {human_bytes(verdict.bytes)} checked: {len(verdict.bad)} bad{done}, "
            f"{len(verdict.unreadable)} unreadable, {len(verdict.newer)} of a newer format"
        )
    if not verdict.ok:
        raise typer.Exit(1)


def check(entries: Iterable[Entry], advance: Callable[[int], object]) -> tuple[Verdict, list[ObjectId]]:
    """Verifies all files; returns the verdict and the ids of damaged ones. Files evicted in the meantime are skipped."""
    from lmcache.format.file import verify_file
    from lmcache.tiers.folder import object_of

    verdict = Verdict()
    bad: list[ObjectId] = []
    for entry in entries:
        id = object_of(entry)
        try:
            if id is None:
                continue  # for the type checker: `walk` yields only names that parse
            verify_file(entry.path, id)
        except FileNotFoundError:
            continue
        except FormatVersionError as error:
            verdict.newer.append(Problem(entry.path, str(error)))
        except FormatError as error:
            if os.path.exists(entry.path):  # not if it was removed while being read
                verdict.bad.append(Problem(entry.path, str(error)))
                assert id is not None
                bad.append(id)
        except OSError as error:
            verdict.unreadable.append(Problem(entry.path, error.strerror or str(error)))
        finally:
            advance(entry.size)
        verdict.checked += 1
        verdict.bytes += entry.size
    return verdict, bad


def _delete(folder: Path, ids: list[ObjectId]) -> int:
    from lmcache.plan import Status
    from lmcache.tiers.disk import DiskTier

    tier = DiskTier(folder)
    try:
        results = tier.delete_damaged(ids)  # not what another process has replaced since
        return sum(result.status is Status.OK and result.nbytes > 0 for result in results)
    finally:
        tier.close()
