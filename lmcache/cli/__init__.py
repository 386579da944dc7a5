"""The command line, `lmcache`: one file per command, each with `--json`.

`--help` must be fast, so command modules import heavy modules (torch, tiers, engines) inside their functions.
"""

from lmcache.cli.app import app, main

__all__ = ["app", "main"]
