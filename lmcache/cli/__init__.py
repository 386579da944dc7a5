"""The command line, `lmcache`: one command a file, each with `--json`.

`--help` must answer at once, so command modules import whatever is heavy (torch, tiers, engines) inside their functions.
"""

from lmcache.cli.app import app, main

__all__ = ["app", "main"]
