"""Reports: counts, reasons, commands to reproduce, and correct escaping of any test output."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lmcache_conformance.runner.html_report import as_html
from lmcache_conformance.runner.matrix import live, show
from lmcache_conformance.runner.records import TestResult
from lmcache_conformance.runner.report import Report, as_json, as_junit, environment
from lmcache_conformance.runner.run import RowResult

NASTY = "</pre><script>alert('x')</script> [bold]not markup[/] \x1b[31m \x00 \ud800 & \U0001f600"


def result(outcome: str, level: str = "bytes", name: str = "test_it", **more: object) -> TestResult:
    return TestResult(nodeid=f"file.py::TestX::{name}", level=level, outcome=outcome, **more)  # type: ignore[arg-type]


@pytest.fixture
def report() -> Report:
    disk = RowResult(
        "disk",
        [
            result("passed", seconds=1.5),
            result("passed", name="test_other", seconds=0.25),
            result("skipped", reason="not claimed: damage"),
            result("skipped", reason="not claimed: damage"),
            result("xfailed", level="faults", reason="until 2.0 (https://example.org/1)"),
            result(
                "failed",
                level="keys",
                name="test_bad[a b]",
                message=NASTY,
                detail=f"all of it {NASTY}",
                command="python -m pytest 'file.py::TestX::test_bad[a b]' --hypothesis-seed=7",
                seed=7,
            ),
        ],
        seconds=12.0,
    )
    crashed = RowResult(
        "hf", [result("passed", level="tokens")], problem="the process was killed by SIGKILL\nlast words"
    )
    empty = RowResult("memory", nothing="no tests of the chosen levels")
    return Report([disk, crashed, empty], {"python": "3.11", "torch": "<2>"}, "lmcache conformance --seed 7", 7)


def printed(report: Report, width: int) -> str:
    out = io.StringIO()
    show(report, Console(file=out, width=width, highlight=False, color_system=None))
    return out.getvalue()


def test_counts_per_row_and_level_add_up(report: Report) -> None:
    value = as_json(report)
    assert list(value) == ["disk", "hf", "memory"]
    assert list(value["disk"]) == ["bytes", "faults", "keys"]  # the order of the levels
    counts = {
        (row, level): (cell["passed"], cell["failed"], cell["skipped"])
        for row, levels in value.items()
        for level, cell in levels.items()
    }
    assert counts == {
        ("disk", "bytes"): (2, 0, 2),
        ("disk", "faults"): (0, 0, 1),
        ("disk", "keys"): (0, 1, 0),
        ("hf", "tokens"): (1, 0, 0),
        ("hf", "other"): (0, 1, 0),
    }
    assert value["disk"]["bytes"]["seconds"] == 1.75
    assert value["disk"]["bytes"]["reasons"] == {"not claimed: damage": 2}
    assert value["disk"]["faults"]["reasons"] == {"known failure: until 2.0 (https://example.org/1)": 1}
    [failure] = value["disk"]["keys"]["failures"]
    assert (failure["test"], failure["seed"]) == ("TestX::test_bad[a b]", 7)
    assert failure["command"].endswith("--hypothesis-seed=7")
    assert not report.ok
    assert json.loads(json.dumps(value)) == value


def test_a_report_without_failures_is_fine() -> None:
    assert Report([RowResult("a", [result("passed"), result("xfailed"), result("skipped")])], {}, "").ok
    assert not Report([RowResult("a", problem="died")], {}, "").ok


@pytest.mark.parametrize("width", [200, 60])
def test_the_matrix_has_every_cell_whatever_the_width(report: Report, width: int) -> None:
    text = printed(report, width)
    matrix = text.partition("Skipped")[0]
    for part in ("disk", "hf", "memory", "bytes", "faults", "keys", "tokens", "other", "✓ 2 – 2", "✗ 1", "✓ 1", "– 1"):
        assert part in matrix, part
    assert max(map(len, matrix.splitlines())) <= width
    lines = matrix.splitlines()
    assert ("bytes" in lines[0]) == (width == 200)


def test_skips_say_why_and_failures_say_level_case_seed_and_command(report: Report) -> None:
    text = printed(report, 100)
    assert "disk: not claimed: damage (2 tests)" in text
    assert "memory: no tests of the chosen levels" in text
    assert "disk · level keys · TestX::test_bad[a b] · seed 7" in text
    assert "[bold]not markup[/]" in text
    assert "    python -m pytest 'file.py::TestX::test_bad[a b]' --hypothesis-seed=7\n" in text
    assert "hf · level other" in text
    assert "killed by SIGKILL" in text
    assert "2 failed · 7 tests · 12 s · seed 7" in text


def test_a_long_message_is_cut_and_says_so() -> None:
    row = RowResult("a", [result("failed", message="\n".join(f"line {i}" for i in range(40)))])
    text = printed(Report([row], {}, ""), 100)
    assert "line 11\n" in text
    assert "line 12" not in text
    assert "28 more lines" in text


def test_what_is_shown_meanwhile_fits_a_terminal(report: Report) -> None:
    out = io.StringIO()
    Console(file=out, width=70).print(live(report, "disk: 3/9 " + "x" * 500, 70))
    assert max(map(len, out.getvalue().splitlines())) <= 70


class Page(HTMLParser):
    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_well_formed_file_that_needs_nothing_else(report: Report) -> None:
    text = as_html(report)
    text.encode("utf-8")
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not [a for a in page.attributes if a[0] in ("src", "href")]
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_has_matrix_failures_commands_skips_and_environment(report: Report) -> None:
    page = Page(as_html(report))
    shown = re.sub(r"\s+", " ", page.text)
    for part in (
        "2 of 7 tests failed",
        "lmcache conformance --seed 7",
        "✓ 2 – 2",
        "level keys · TestX::test_bad[a b] · seed 7",
        "python -m pytest 'file.py::TestX::test_bad[a b]' --hypothesis-seed=7",
        "<script>alert('x')</script>",
        "all of it",
        "not claimed: damage",
        "no tests of the chosen levels",
        "last words",
        "<2>",
    ):
        assert part in shown, part


def test_junit_is_xml_with_every_test_once(report: Report) -> None:
    text = as_junit(report)
    root = ElementTree.fromstring(text.encode("utf-8"))
    suites = {s.get("name"): s for s in root.findall("testsuite")}
    assert list(suites) == ["disk", "hf", "memory"]
    disk = suites["disk"]
    assert (disk.get("tests"), disk.get("failures"), disk.get("skipped")) == ("6", "1", "3")
    assert [c.get("classname") for c in disk] == ["disk.bytes"] * 4 + ["disk.faults", "disk.keys"]
    failure = disk.find("testcase/failure")
    assert failure is not None
    assert "--hypothesis-seed=7" in (failure.text or "")
    assert suites["hf"].get("failures") == "1"
    assert len(suites["memory"]) == 0


def test_the_environment_names_what_a_reader_asks_first() -> None:
    found = environment()
    assert {"python", "platform", "processor", "lmcache-sdk", "torch", "pytest"} <= set(found)
    assert all(found.values())
