"""Builds the command that repeats one test exactly as it was run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

SEED_OPTION = "--hypothesis-seed"

_FINDS = ("python_", "pythonpath", "testpaths")
_OURS = {
    "--lmcache-adapter": "lmcache_adapter",
    "--lmcache-budget": "lmcache_budget",
    "--lmcache-xfails": "lmcache_xfails",
}


def command(item: pytest.Item, seed: int | None) -> str:
    """Returns a shell command, to be run from the folder in which this pytest was started.

    Of pytest's own options it includes those that affect test discovery (`-c`, `--rootdir`, `-o`).
    """
    config = item.config
    words = [sys.executable or "python", "-m", "pytest", test_id(item)]
    if config.option.inifilename:
        words += ["-c", str(config.option.inifilename)]
    if config.option.rootdir:
        words += ["--rootdir", str(config.option.rootdir)]
    for override in config.option.override_ini or ():
        if override.startswith(_FINDS):
            words += ["-o", override]
    for option, name in _OURS.items():
        value = getattr(config.option, name, None)
        if value is not None:
            words.append(f"{option}={value}")
    if seed is not None:
        words.append(f"{SEED_OPTION}={seed}")
    return shlex.join(words)


def test_id(item: pytest.Item) -> str:
    """Returns `path::Class::test[case]`, with the path relative to the folder where pytest was started, or absolute."""
    path = Path(os.path.abspath(item.path))
    start = Path(os.path.abspath(item.config.invocation_params.dir))
    shown = path.relative_to(start) if path.is_relative_to(start) else path
    _, _, rest = item.nodeid.partition("::")
    return f"{shown}::{rest}" if rest else str(shown)


test_id.__test__ = False  # type: ignore[attr-defined]
