"""`lmcache conformance`: checks that a hit is bit-for-bit what was computed, for every installed adapter, tier and layout."""

from __future__ import annotations

import secrets
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache.cli.output import JsonOption, console, print_json
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_conformance.runner.mutate import Verdict
    from lmcache_conformance.runner.run import Job, RowResult
    from lmcache_conformance.runner.selection import Selection

_NEEDED = ("pytest", "hypothesis", "lmcache_conformance")


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(conformance)


def conformance(
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME", help="An engine adapter; repeatable.")
    ] = None,
    tier: Annotated[list[str] | None, typer.Option("--tier", metavar="NAME", help="A tier; repeatable.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="NAME", help="Any other test target; repeatable."),
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option("--level", metavar="NAME", help="Only tests of this level; repeatable.")
    ] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="Thoroughness; --full uses the real model.")] = False,
    mutants: Annotated[
        bool,
        typer.Option(
            "--mutants", help="Test the suites themselves: they must fail on every known defect (mutation testing)."
        ),
    ] = False,
    xfails: Annotated[
        Path | None,
        typer.Option("--xfails", metavar="FILE", help="File of known failures, each with a link to its issue."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the run to repeat.")] = None,
    json: JsonOption = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write an HTML report.")] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write a JUnit XML report for CI systems.")
    ] = None,
) -> None:
    """Run the conformance suite, which checks that a hit is bit-for-bit what was computed.

    Without names, everything installed is tested: tiers, layouts, kernels, keys, the cache, and every engine adapter.
    Tests of capabilities that an adapter or tier does not claim are skipped with that reason. Exit status 1 if a test
    failed or a mutant survived.

    \b
    Examples:
      lmcache conformance
      lmcache conformance --tier disk --level faults --level restart
      lmcache conformance --adapter hf --full --html report.html
      lmcache conformance --mutants --json
    """
    missing = [name for name in _NEEDED if util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the suite needs {' and '.join(missing)}: pip install 'lmcache-sdk[conformance]'")
    from lmcache_conformance.runner.discover import DiscoveryError
    from lmcache_conformance.runner.selection import Selection
    from lmcache_conformance.runner.xfails import XfailError

    selection = Selection(
        adapters=tuple(adapter or ()),
        tiers=tuple(tier or ()),
        targets=tuple(target or ()),
        levels=tuple(name for names in level or () for name in names.split(",")),
        budget="full" if full else "quick",
        seed=secrets.randbelow(2**32) if seed is None else seed,
        xfails=xfails,
    )
    for file in (html, junit):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {str(file.absolute().parent)!r} to write {file.name} into")
    try:
        fine = _mutants(selection, json) if mutants else _suites(selection, json, html, junit)
    except (DiscoveryError, XfailError) as error:
        raise ConfigError(str(error)) from None
    if not fine:
        raise typer.Exit(1)


def _suites(selection: Selection, json: bool, html: Path | None, junit: Path | None) -> bool:
    from lmcache_conformance.runner import report as reports
    from lmcache_conformance.runner.html_report import as_html
    from lmcache_conformance.runner.matrix import show
    from lmcache_conformance.runner.selection import jobs_for

    jobs = jobs_for(selection)
    rows = _run(jobs, selection) if json else _run_live(jobs, selection)
    report = reports.Report(rows, reports.environment(), reports.command_line(), selection.seed)
    if html is not None:
        html.write_text(as_html(report), encoding="utf-8")
    if junit is not None:
        junit.write_text(reports.as_junit(report), encoding="utf-8")
    if json:
        print_json(reports.as_json(report))
    else:
        show(report, console(markup=True))
    return report.ok


def _run(jobs: list[Job], selection: Selection) -> list[RowResult]:
    from lmcache_conformance.runner.run import run_jobs

    return run_jobs(jobs, selection.limits)


def _run_live(jobs: list[Job], selection: Selection) -> list[RowResult]:
    from rich.live import Live

    from lmcache_conformance.runner.matrix import live
    from lmcache_conformance.runner.records import Event, Started
    from lmcache_conformance.runner.report import Report
    from lmcache_conformance.runner.run import run_jobs

    rows: dict[str, RowResult] = {}
    out = console(markup=True)
    with Live(console=out, transient=True, auto_refresh=True, refresh_per_second=4) as screen:
        screen.update(live(Report([], {}, ""), f"{jobs[0].row}: starting", out.width))

        def show(row: RowResult, event: Event) -> None:
            rows[row.row] = row
            doing = f"{row.row}: {len(row.results)}/{row.total}"
            if isinstance(event, Started):
                doing += f" {event.nodeid.partition('::')[2]}"
            screen.update(live(Report(list(rows.values()), {}, ""), doing, out.width))

        return run_jobs(jobs, selection.limits, progress=show)


def _mutants(selection: Selection, json: bool) -> bool:
    from rich.markup import escape

    from lmcache_conformance.runner.mutate import choose_mutants, run_mutants, uncovered

    chosen = choose_mutants(selection.targets)
    out = console(markup=True)

    def show(verdict: Verdict) -> None:
        words = {True: "[green]killed[/]  ", False: "[bold red]SURVIVED[/]", None: "[yellow]skipped[/] "}
        word = words[verdict.killed]
        out.print(
            f"{word} {verdict.name} [dim]{verdict.seconds:.0f} s,[/]",
            escape(verdict.by or verdict.reason),
            soft_wrap=True,
        )

    verdicts = run_mutants(
        chosen, selection.limits, options=selection.options(), progress=(lambda v: None) if json else show
    )
    if not selection.targets:
        verdicts += uncovered()
    if json:
        print_json({"mutants": [verdict.as_json() for verdict in verdicts]})
    else:
        from lmcache_conformance.runner.matrix import mutant_table

        out.print()
        out.print(mutant_table([verdict.as_json() for verdict in verdicts]))
        survived = sum(verdict.killed is False for verdict in verdicts)
        killed = sum(verdict.killed is True for verdict in verdicts)
        out.print(f"\n{killed} killed, {survived} survived, {len(verdicts) - killed - survived} cannot be built here")
    return all(verdict.killed is not False for verdict in verdicts)
