"""Shared by commands: the `--json` and `--path` options, JSON on stdout, and human-readable sizes and ages."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache.config import Config
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]
PathOption = Annotated[
    str | None,
    typer.Option("--path", metavar="FOLDER", help="Folder of the disk tier; default: the configured disk_path."),
]


def console(*, markup: bool = False) -> Console:
    """Returns a console on stdout. With `markup`, `[…]` in printed text is formatting: pass everything else through `escape`."""
    from rich.console import Console

    return Console(highlight=False, markup=markup, emoji=False)


def print_line(text: str) -> None:
    """Prints one line, whatever the width of the terminal, so that paths are not broken."""
    console().print(text, soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table as wide as it needs: figures that are cut off are useless, so a narrow terminal wraps the lines instead."""
    from rich.measure import Measurement

    out = console()
    out.width = max(out.width, Measurement.get(out, out.options.update(max_width=1000), table).maximum)
    out.print(table)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Prints one JSON document, without terminal formatting."""
    typer.echo(jsonlib.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Returns the value with null for numbers that JSON does not have: infinities and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def folder_of(text: str | None, option: str) -> Path | None:
    """Returns the folder that an option gives, or None.

    Raises:
        ConfigError: the text is empty, or no plain path.
    """
    from lmcache.config.settings import path_of

    try:
        return None if text is None else path_of(text, "folder")
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def load_config(path: str | Path | None) -> Config:
    """Loads the configuration, with `--path` as `disk_path`."""
    return Config.load({} if path is None else {"disk_path": path})


def disk_folder(path: str | Path | None) -> Path:
    """Returns the folder of the disk tier, which must exist: `disk_path`, or our own folder in it if others may write to it.

    Raises:
        ConfigError: no folder is configured, or it does not exist.
    """
    from lmcache.tiers.owner import cache_folder

    folder = load_config(path).disk_path
    if folder is None:
        raise ConfigError(
            "no disk tier is configured; give its folder with --path, LMCACHE_DISK_PATH or a settings file"
        )
    try:
        found = folder.is_dir()
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be looked at ({error.strerror}); check its permissions") from None
    if not found:
        raise ConfigError(f"there is no folder {str(folder)!r}; check --path, or the configured disk_path")
    own = Path(cache_folder(folder))
    if not own.is_dir():
        others = ", ".join(sorted(str(path) for path in folder.glob("lmcache-*"))) or "none"
        raise ConfigError(
            f"there is no folder {str(own)!r}, where your cache would be; of other users: {others} (--path)"
        )
    return own


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
