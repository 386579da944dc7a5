"""`python -m lmcache_sglang`: what it prints itself, before SGLang is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lmcache.config import Config
from lmcache.errors import ConfigError
from lmcache_sglang.launch import split_command


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--disk-path", "/x", "--help", "--", "--model-path", "x"]])
def test_help_is_usage_with_every_setting_and_status_0(arguments: list[str]) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lmcache_sglang", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("usage: python -m lmcache_sglang ")
    for setting in Config.settings():
        assert f"  --{setting.name.replace('_', '-')} VALUE" in done.stdout


def test_sglangs_own_help_is_left_to_sglang() -> None:
    assert split_command(["--disk-path", "/x", "--", "--help"]) == ({"disk_path": "/x"}, ["--help"])


def test_a_value_that_is_no_json_is_a_setting_that_is_wrong() -> None:
    with pytest.raises(ConfigError, match="--prefetch-threshold needs a number, true or false, not 'many'"):
        split_command(["--prefetch-threshold", "many", "--"])
