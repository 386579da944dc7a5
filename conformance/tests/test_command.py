"""`lmcache conformance`: selection, runs, reports and exit status."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from lmcache.cli import app, main
from lmcache_conformance.mutants import Mutant
from lmcache_conformance.mutants.rows import ROWS
from lmcache_conformance.runner import mutate, selection
from lmcache_conformance.runner.discover import DiscoveryError, Target
from lmcache_conformance.runner.selection import Selection, jobs_for

HEAD = """
import time, pytest
from lmcache_conformance.contract import Level
from lmcache_conformance.runner.marks import level, requires
class {name}:
    adapter = None
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three targets: a tier that passes, one that fails, and the engine target."""

    def module(name: str, body: str) -> None:
        (tmp_path / f"{name}.py").write_text(
            HEAD.format(name="TestIt") + textwrap.indent(textwrap.dedent(body), "    ")
        )

    module("fine_checks", "adapter = 'x:y'\n@level(Level.BYTES)\ndef test_a(self): pass")
    module("bad_checks", "@level(Level.KEYS)\ndef test_b(self): assert 'told' == 'stored'")
    module(
        "engine_checks",
        """
        @level(Level.RESTART)
        @requires("restart")
        def test_c(self, lmcache_adapter): pass
        @level(Level.ISOLATION)
        @requires("salt")
        def test_d(self): assert False
        """,
    )
    (tmp_path / "fine_checks.py").write_text((tmp_path / "fine_checks.py").read_text().replace("adapter", "other"))
    (tmp_path / "bad_checks.py").write_text((tmp_path / "bad_checks.py").read_text().replace("adapter", "other"))
    found = [
        Target("fine", "fine_checks", "tier"),
        Target("bad", "bad_checks", "tier"),
        Target("engine", "engine_checks", "engine"),
    ]
    monkeypatch.setattr(selection, "targets", lambda: found)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent}")
    return tmp_path


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["conformance", *words], env={"COLUMNS": "160"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def fails(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the error message of a wrong call."""
    monkeypatch.setattr(sys, "argv", ["lmcache", "conformance", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_tier_by_name_passes_with_status_0(installed: Path) -> None:
    status, out = run("--tier", "fine", "--json", "--seed", "5")
    assert status == 0
    value = json.loads(out)
    assert value == {"fine": {"bytes": value["fine"]["bytes"]}}
    assert (value["fine"]["bytes"]["passed"], value["fine"]["bytes"]["failed"], value["fine"]["bytes"]["skipped"]) == (
        1,
        0,
        0,
    )


def test_a_failure_is_status_1_and_all_reports_have_it(installed: Path) -> None:
    page, xml = installed / "report.html", installed / "report.xml"
    status, out = run("--tier=bad", "--adapter=fake_adapters:good", "--seed=5", f"--html={page}", f"--junit={xml}")
    assert status == 1
    assert "bad · level keys · TestIt::test_b · seed 5" in out
    assert "AssertionError: assert 'told' == 'stored'" in out
    assert f"{installed}/bad_checks.py::TestIt::test_b" in out
    assert "fake_adapters:good: not claimed: salt (1 tests)" in out
    assert "1 failed · 3 tests" in out
    assert "told" in page.read_text()
    assert ElementTree.parse(xml).getroot().find(".//failure") is not None


def test_levels_leave_out_the_rest(installed: Path) -> None:
    status, out = run("--tier", "fine", "--tier", "bad", "--level", "bytes", "--json")
    assert status == 0
    assert json.loads(out)["bad"] == {}


def test_known_failures_are_no_failure(installed: Path) -> None:
    (installed / "known.txt").write_text("test_b https://example.org/1\n")
    status, out = run("--tier", "bad", "--json", "--xfails", str(installed / "known.txt"))
    assert status == 0
    assert json.loads(out)["bad"]["keys"]["reasons"] == {"known failure: https://example.org/1": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tier", "fin"], "unknown tier 'fin'; did you mean 'fine'? Available: bad, fine"),
        (["--tier", "engine"], "unknown tier 'engine'"),
        (["--target", "engin"], "did you mean 'engine'?"),
        (["--adapter", "hg"], "unknown adapter 'hg'; did you mean 'hf'?"),
        (["--level", "byte"], "unknown level 'byte'; did you mean 'bytes'?"),
        (["--xfails", "none.txt"], "'none.txt' cannot be read"),
        (["--html", "/no/such/r.html"], "there is no folder '/no/such' to write r.html into"),
        (["--mutants", "--target", "tierz"], "unknown mutant 'tierz'"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest_one(
    installed: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = fails(words, monkeypatch, capsys)
    assert message in error
    assert error.startswith("lmcache: ")
    assert error.count("\n") == 1


def test_a_missing_dependency_is_an_error_with_the_install_command(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmcache.cli.conformance.util.find_spec", lambda name: None if name == "hypothesis" else 1)
    assert fails([], monkeypatch, capsys) == (
        "lmcache: the suite needs hypothesis: pip install 'lmcache-sdk[conformance]'\n"
    )


def test_nothing_named_means_every_target_and_every_adapter(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "adapter_names", lambda: ["fine", "hf"])
    jobs = jobs_for(Selection(seed=9, budget="full", levels=("bytes", "keys")))
    assert [job.row for job in jobs] == ["fine", "bad", "adapter fine", "hf"]
    assert "--lmcache-adapter=hf" in jobs[-1].options
    assert all(
        {"--hypothesis-seed=9", "--lmcache-budget=full", "--lmcache-level=bytes,keys"} <= {*j.options} for j in jobs
    )
    assert [job.row for job in jobs_for(Selection(adapters=("hf",)))] == ["hf"]
    assert [job.row for job in jobs_for(Selection(targets=("engine",)))] == ["fine", "hf"]
    assert [job.row for job in jobs_for(Selection(tiers=("bad", "bad")))] == ["bad"]


def test_our_own_targets_have_sources_that_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_for(Selection())
    rows = [job.row for job in jobs]
    assert {"memory", "disk", "layouts", "kernels", "keys", "index", "cache", "hf"} <= set(rows)
    assert all(Path(job.test).is_file() for job in jobs)
    with pytest.raises(DiscoveryError, match="no module nowhere"):
        selection.file_of(Target("t", "nowhere", "other"))


# ---------------------------------------------------------------- mutants

MUTANTS = """
from lmcache_conformance.contract import Level
from lmcache_conformance.runner.marks import level
import os, pytest
class MutantCaught:
    @level(Level.BYTES)
    def test_fine(self): pass
    @level(Level.BYTES)
    def test_catches(self): assert 1 == 2
    @level(Level.BYTES)
    def test_never_run(self): open("ran", "w")
class MutantSurvives:
    @level(Level.BYTES)
    def test_fine(self): pass
class MutantBroken:
    @pytest.fixture
    def tier(self): raise AssertionError("in set-up")
    @level(Level.BYTES)
    def test_it(self, tier): pass
class MutantRaises:
    @level(Level.BYTES)
    def test_it(self): raise TypeError("not a check")
class MutantDies:
    @level(Level.BYTES)
    def test_it(self): os._exit(1)
"""


def test_only_a_failed_check_kills_a_mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mutated.py").write_text(MUTANTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("MutantCaught", "MutantSurvives", "MutantBroken", "MutantRaises", "MutantDies")
    module = __import__("mutated")
    monkeypatch.setattr(
        mutate, "all_mutants", lambda: [Mutant(f"mutated.{n}", ROWS[0], "here #1", getattr(module, n)) for n in names]
    )
    monkeypatch.setattr(mutate, "skipped_rows", list)
    monkeypatch.chdir(tmp_path)
    status, out = run("--mutants", "--json", "--target", "mutated")
    assert status == 1
    found = {m["name"]: m for m in json.loads(out)["mutants"]}
    assert {n: m["killed"] for n, m in found.items()} == {f"mutated.{n}": n == "MutantCaught" for n in names}
    assert found["mutated.MutantCaught"]["by"] == "test_catches"
    assert not (tmp_path / "ran").exists()
    assert found["mutated.MutantSurvives"]["reason"] == "none of 1 tests failed"
    assert "in setup: AssertionError: in set-up" in found["mutated.MutantBroken"]["reason"]
    assert "not by assertion: TypeError" in found["mutated.MutantRaises"]["reason"]
    assert "exit status 1" in found["mutated.MutantDies"]["reason"]


def test_every_row_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class MutantA: ...

    monkeypatch.setattr(mutate, "all_mutants", lambda: [Mutant("m.A", ROWS[0], "", MutantA)])
    monkeypatch.setattr(mutate, "skipped_rows", lambda: [mutate.SkippedRow(ROWS[1], "needs a GPU")])
    found = {v.row: v for v in mutate.uncovered()}
    assert set(found) == set(ROWS[1:])
    assert (found[ROWS[1]].killed, found[ROWS[1]].reason) == (None, "needs a GPU")
    assert (found[ROWS[2]].killed, found[ROWS[2]].reason) == (False, "no mutant has this row")
