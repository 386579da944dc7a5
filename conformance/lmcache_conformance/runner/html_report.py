"""The report as one self-contained HTML file, e.g. to attach to a bug report."""

from __future__ import annotations

import html
from datetime import UTC, datetime

from lmcache_conformance.runner.records import TestResult
from lmcache_conformance.runner.report import Cell, Report, clean

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a7f37; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child, table.text td, table.text th { text-align: left }
table.text td { white-space: normal; vertical-align: top }
.passed { color: var(--good) } .failed { color: var(--bad); font-weight: 600 } .skipped { opacity: .65 }
pre { background: var(--soft); padding: .7rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; margin: .6rem 0 }
summary { cursor: pointer } code { font-size: .9em }
"""


def as_html(report: Report) -> str:
    """Returns the whole page. All output of tests is escaped."""
    failures = list(report.failures())
    tests = sum(len(row.results) for row in report.rows)
    seconds = sum(row.seconds for row in report.rows)
    verdict = (
        f'<span class="failed">{len(failures)} of {tests} tests failed</span>'
        if failures
        else f'<span class="passed">nothing failed</span> in {tests} tests'
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    seed = "" if report.seed is None else f" · seed {report.seed}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LMCache conformance report</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>LMCache conformance report</h1>
<p>{verdict} · {seconds:.0f} s{seed} · {now}</p>
<pre>{escape(report.command)}</pre>
<h2>Matrix</h2>
{_matrix(report)}
<p class="skipped">✓ passed, ✗ failed, – skipped; the reasons are below. A dot: the row has no tests of that level.</p>
{_failures(failures)}
{_skips(report)}
<h2>Environment</h2>
{_environment(report)}
</body>
</html>
"""


def _matrix(report: Report) -> str:
    levels = report.levels()
    head = "".join(f"<th>{escape(level.replace('_', ' '))}</th>" for level in levels)
    body = []
    for row in report.rows:
        cells = report.cells(row)
        columns = "".join(f"<td>{_cell(cells.get(level))}</td>" for level in levels)
        body.append(f"<tr><td>{escape(row.row)}</td>{columns}<td>{row.seconds:.1f}</td></tr>")
    rows = "\n".join(body)
    head = f"<tr><th></th>{head}<th>seconds</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>'


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "·"
    parts = [("failed", "✗", cell.failed), ("passed", "✓", cell.passed), ("skipped", "–", cell.skipped)]
    return " ".join(f'<span class="{name}">{sign} {count}</span>' for name, sign, count in parts if count)


def _failures(failures: list[tuple[str, TestResult]]) -> str:
    if not failures:
        return ""
    return "<h2>Failures</h2>\n" + "\n".join(_failure(row, result) for row, result in failures)


def _failure(row: str, result: TestResult) -> str:
    seed = "" if result.seed is None else f" · seed {result.seed}"
    again = f"<p>Reproduce:</p><pre>{escape(result.command)}</pre>" if result.command else ""
    return f"""<details open>
<summary><b>{escape(row)}</b> · level {escape(result.level)} · <code>{escape(result.case)}</code>{seed}</summary>
<pre class="failed">{escape(result.message)}</pre>
{again}
<details><summary>full output</summary><pre>{escape(result.detail)}</pre></details>
</details>"""


def _skips(report: Report) -> str:
    rows = [
        f"<tr><td>{escape(row)}</td><td>{escape(reason)}</td><td>{count or ''}</td></tr>"
        for row, reason, count in report.skips()
    ]
    if not rows:
        return ""
    head = "<tr><th>row</th><th>reason</th><th>tests</th></tr>"
    return f'<h2>Skipped</h2>\n<table class="text"><thead>{head}</thead>\n<tbody>{"".join(rows)}</tbody></table>'


def _environment(report: Report) -> str:
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in report.environment.items())
    return f'<table class="text"><tbody>{rows}</tbody></table>'


def escape(text: str) -> str:
    """Escapes text for HTML and replaces characters that HTML cannot represent."""
    return html.escape(clean(text))
