"""Fills the documentation's `<!-- generated: … -->` marks from the code, so that these pages cannot be out of date."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

MARK = re.compile(r"<!-- generated: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""
    return MARK.sub(lambda match: GENERATORS[match[1]](), markdown)


def settings() -> str:
    """One section per setting of `lmcache.Config`."""
    from lmcache.config import PREFIX, Config

    sections = []
    for setting in Config.settings():
        facts = [setting.kind.label, f"default `{_shown(setting.default)}`"]
        facts += [f"in {setting.unit}"] if setting.unit and setting.unit != "bytes" else []
        sections.append(
            f"### `{setting.name}`\n\n{setting.doc}\n\n`{PREFIX}{setting.name.upper()}` · {' · '.join(facts)}\n"
        )
    return "\n".join(sections)


def commands() -> str:
    """The help text of `lmcache` and of each command, as a terminal shows it."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from lmcache.cli import app

    plain = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    runner = CliRunner(env=plain)

    def walk(command: Any, path: list[str]) -> list[str]:
        shown = runner.invoke(app, [*path, "--help"], prog_name="lmcache")
        if shown.exit_code != 0:
            raise RuntimeError(f"lmcache {' '.join(path)} --help failed: {shown.output}") from shown.exception
        text = "\n".join(line.rstrip() for line in shown.output.strip("\n").splitlines())
        sections = [f"## `{' '.join(['lmcache', *path])}`\n\n```text\n{text}\n```\n"]
        for name, sub in getattr(command, "commands", {}).items():
            sections += walk(sub, [*path, name])
        return sections

    return "\n".join(walk(get_command(app), []))


def metrics() -> str:
    """A table of every metric."""
    from lmcache.observe.metrics import Metrics

    rows = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in Metrics().families:
        labels = ", ".join(f"`{name}`" for name in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.doc} |")
    return "\n".join(rows)


def miss_reasons() -> str:
    """A table of the reasons a miss can have."""
    from lmcache.observe.metrics import MISS_REASONS

    rows = ["| reason | meaning |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| `{reason}` | {meaning} |" for reason, meaning in MISS_REASONS.items())])


def estimates() -> str:
    """A table of what copies should cost on a GPU."""
    from lmcache.bench.estimate import estimates

    rows = [
        "| model, link | MB | descriptors | KiB each | by | link, ms | SM·ms of a load | of a store |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {e.model}, {e.link} | {e.megabytes:.0f} | {e.descriptors:,} | {e.piece_kib:.0f} | {e.road} | {e.link_ms:.2f} "
        f"| {e.load_sm_ms:.1f} | {e.store_sm_ms:.1f} |"
        for e in estimates()
    ]
    return "\n".join(rows)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "nothing" if default is None else str(default)


GENERATORS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "commands": commands,
    "metrics": metrics,
    "miss_reasons": miss_reasons,
    "estimates": estimates,
}
