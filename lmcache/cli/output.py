"""Shared by commands: the `--json` and `--path` options, JSON on stdout, and human-readable sizes and ages."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache.config import Config
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]
PathOption = Annotated[
    Path | None,
    typer.Option("--path", metavar="FOLDER", help="Folder of the disk tier; default: the configured disk_path."),
]


def console() -> Console:
    """Returns a console on stdout."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Prints one JSON document, without terminal formatting."""
    typer.echo(jsonlib.dumps(value, indent=2))


def load_config(path: Path | None) -> Config:
    """Loads the configuration, with `--path` as `disk_path`."""
    return Config.load({} if path is None else {"disk_path": path})


def disk_folder(path: Path | None) -> Path:
    """Returns the folder of the disk tier, which must exist.

    Raises:
        ConfigError: no folder is configured, or it does not exist.
    """
    folder = load_config(path).disk_path
    if folder is None:
        raise ConfigError(
            "no disk tier is configured; give its folder with --path, LMCACHE_DISK_PATH or a settings file"
        )
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}; check --path, or the configured disk_path")
    return folder


def human_bytes(size: float) -> str:
    """Formats bytes, e.g. `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_age(seconds: float) -> str:
    """Formats a duration, e.g. `3 min`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
