"""`python -m lmcache_sglang [--disk-path FOLDER …] -- [SGLang's arguments]`: runs SGLang's server with this backend."""

from __future__ import annotations

import runpy
import sys

from lmcache.errors import ConfigError
from lmcache_sglang.launch import flags, split_command, usage


def main() -> None:
    """Runs SGLang's server in this process; exits with a message if a setting is wrong, before SGLang is loaded."""
    ours = sys.argv[1:]
    if {"-h", "--help"} & {*ours[: ours.index("--") if "--" in ours else None]}:
        print(usage())
        return
    try:
        settings, theirs = split_command(sys.argv[1:])
        sys.argv = ["sglang.launch_server", *theirs, *flags(**settings)]
    except ConfigError as error:
        sys.exit(f"lmcache_sglang: {error}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
