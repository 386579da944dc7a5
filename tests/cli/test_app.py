"""The command line as a whole: fast, complete, and with one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clilab import Run
from typer.main import get_command

import lmcache
from lmcache.cli import app, main
from lmcache.cli.output import human_age, human_bytes, print_json
from lmcache.errors import ConfigError

HEAVY = ("torch", "numpy", "transformers", "yaml", "lmcache_hf", "lmcache.tiers.disk", "prometheus_client")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\ntry:\n    from lmcache.cli import main; main()\nexcept SystemExit: pass\nprint('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    text, _, loaded = done.stdout.partition("LOADED")
    assert "verify" in text
    assert not set(loaded.split()).intersection(HEAVY)


def test_every_command_has_json_and_examples(run: Run) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {"demo", "doctor", "bench", "conformance", "ls", "verify", "clear"} <= set(commands)
    for name, command in commands.items():
        for path, leaf in [([name, sub], c) for sub, c in getattr(command, "commands", {}).items()] or [
            ([name], command)
        ]:
            assert "--json" in [o for p in leaf.params for o in p.opts], path
            shown = run(*path, "--help", env={"COLUMNS": "200"})
            assert shown.exit_code == 0
            assert "Examples" in shown.stdout, path
            assert f"lmcache {' '.join(path)}" in shown.stdout, path


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version").stdout == f"lmcache-sdk {lmcache.__version__}\n"


def test_a_typed_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["lmcache", "ls", "--path", str(tmp_path / "none"), "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"lmcache: there is no folder '{tmp_path}/none'; check --path, or the configured disk_path\n"


def test_sizes_and_ages_are_short_for_people() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [human_age(s) for s in (-1, 5, 90, 7200, 200000)] == ["0 s", "5 s", "2 min", "2 h", "2 d"]


def test_what_the_terminal_cannot_show_is_a_question_mark() -> None:
    command = [sys.executable, "-m", "lmcache", "bench", "io", "--help"]
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1", "COLUMNS": "200"}
    done = subprocess.run(command, env=environ, capture_output=True, timeout=120, check=True)
    assert b"Measure paged KV ? DRAM" in done.stdout


def test_json_has_null_for_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    infinity = float("inf")
    print_json({"a": infinity, "b": [1.5, -infinity, (float("nan"), True)], "c": {"d": "x"}})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, None, [None, True]], "c": {"d": "x"}}


@pytest.mark.parametrize(
    "command", [["bench", "io", "--part", "disk", "--folder", ""], ["demo", "--cache-dir", "$X/kv"]]
)
def test_options_for_folders_take_no_odd_spelling(run: Run, command: list[str]) -> None:
    result = run(*command)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"{command[-2]}: ")
