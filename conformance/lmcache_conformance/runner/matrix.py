"""Terminal output: a matrix of rows × levels, the reasons of skips, and the failures with commands to reproduce them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lmcache_conformance.runner.records import TestResult
from lmcache_conformance.runner.report import Cell, Report

_MESSAGE_LINES = 12


def show(report: Report, out: Console) -> None:
    """Prints the whole report."""
    out.print(table(report, out.width))
    skips = list(report.skips())
    if skips:
        out.print("\n[bold]Skipped[/]")
        for row, reason, count in skips:
            out.print(f"  {escape(row)}: {escape(reason)}" + (f" [dim]({count} tests)[/]" if count else ""))
    failures = list(report.failures())
    if failures:
        out.print("\n[bold red]Failed[/]")
        for row, failure in failures:
            _show_failure(out, row, failure)
    tests = sum(len(row.results) for row in report.rows)
    seconds = sum(row.seconds for row in report.rows)
    verdict = f"[bold red]{len(failures)} failed[/]" if failures else "[bold green]nothing failed[/]"
    seed = "" if report.seed is None else f" · seed {report.seed}"
    out.print(f"\n{verdict} · {tests} tests · {seconds:.0f} s{seed}")


def table(report: Report, width: int) -> Table:
    """Returns a table of rows × levels, transposed if it would be wider than `width`."""
    levels = report.levels()
    names = [level.replace("_", "\n") for level in levels]
    needed = sum(max(max(map(len, name.split("\n"))), 6) + 2 for name in names) + 24
    if needed <= width:
        found = Table(box=None, pad_edge=False, header_style="bold")
        found.add_column("")
        for name in names:
            found.add_column(name, justify="right")
        found.add_column("seconds", justify="right")
        for row in report.rows:
            cells = report.cells(row)
            found.add_row(escape(row.row), *(_cell(cells.get(level)) for level in levels), f"{row.seconds:.0f}")
        return found
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("")
    all_cells = [report.cells(row) for row in report.rows]
    for row in report.rows:
        found.add_column(escape(row.row), justify="right")
    for level in levels:
        found.add_row(level.replace("_", " "), *(_cell(cells.get(level)) for cells in all_cells))
    found.add_row("[bold]seconds[/]", *(f"{row.seconds:.0f}" for row in report.rows))
    return found


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("·", style="dim")
    parts = []
    if cell.failed:
        parts.append(Text(f"✗ {cell.failed}", style="bold red"))
    if cell.passed:
        parts.append(Text(f"✓ {cell.passed}", style="green"))
    if cell.skipped:
        parts.append(Text(f"– {cell.skipped}", style="dim"))
    return Text(" ").join(parts)


def _show_failure(out: Console, row: str, failure: TestResult) -> None:
    seed = "" if failure.seed is None else f" · seed {failure.seed}"
    out.print(f"\n  [bold]{escape(row)}[/] · level {failure.level} · {escape(failure.case)}{seed}")
    lines = failure.message.splitlines()
    for line in lines[:_MESSAGE_LINES]:
        out.print(Text(f"    {line}"))
    if len(lines) > _MESSAGE_LINES:
        out.print(f"    [dim]… {len(lines) - _MESSAGE_LINES} more lines[/]")
    if failure.command:
        out.print(
            Text(f"    {failure.command}", style="cyan"), soft_wrap=True
        )  # no line breaks, so that it can be copied


def live(report: Report, doing: str, width: int) -> RenderableType:
    """Returns the display during a run: the table so far and the current test."""
    parts: list[RenderableType] = [table(report, width)] if any(row.results for row in report.rows) else []
    return Group(*parts, Spinner("dots", Text(doing, no_wrap=True, overflow="ellipsis")))


def mutant_table(entries: Sequence[dict[str, object]]) -> Table:
    """Returns a table of mutants and the tests that killed them."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "mutant", "what goes wrong", "caught by"):
        found.add_column(name, overflow="fold")
    for entry in entries:
        mark = {True: "[green]killed[/]", False: "[bold red]SURVIVED[/]", None: "[dim]skipped[/]"}[entry["killed"]]  # type: ignore[index]
        caught = entry["by"] or entry["reason"]
        found.add_row(mark, escape(str(entry["name"])), escape(str(entry["row"])), escape(str(caught)))
    return found
