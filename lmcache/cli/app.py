"""Assembles the commands and reports typed errors as one line on stderr."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from lmcache.cli import bench, clear, conformance, demo, doctor, ls, simulate, verify
from lmcache.errors import LMCacheError

app = typer.Typer(
    name="lmcache",
    help="An engine-agnostic KV cache: a hit is bit-for-bit what was computed, or it is a miss.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import lmcache

        typer.echo(f"lmcache-sdk {lmcache.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (demo, doctor, bench, conformance, simulate, ls, verify, clear):
    command.register(app)


def main() -> None:
    """Entry point. Exit status: 0 = success, 1 = the command found a problem, 2 = the command could not run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # `?` for what the encoding does not have, instead of a traceback
            stream.reconfigure(errors="replace")
    try:
        app()
    except (LMCacheError, OSError) as error:
        print(f"lmcache: {error}", file=sys.stderr)
        sys.exit(2)
