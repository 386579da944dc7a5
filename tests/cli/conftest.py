"""Fixtures for tests of commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from clilab import Run, Shelf, fill
from typer.testing import CliRunner

from lmcache.cli import app


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return fill(tmp_path / "kv")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `lmcache …` in this process, without the caller's settings in the environment."""
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)

    def invoke(*args: object, **kwargs: Any) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)

    return invoke
