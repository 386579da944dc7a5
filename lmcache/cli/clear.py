"""`lmcache clear`: empties the disk tier, or one namespace of it."""

from __future__ import annotations

from typing import Annotated

import typer

from lmcache.cli.ls import tally
from lmcache.cli.output import JsonOption, PathOption, disk_folder, human_bytes, print_json, print_line
from lmcache.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(clear)


def clear(
    path: PathOption = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace", metavar="HEX", help="Remove only this namespace; the first digits suffice, as shown by `ls`."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove objects from the disk tier permanently. Running engines may use the folder: all but vLLM drop the same from memory.

    \b
    Examples:
      lmcache clear --yes
      lmcache clear --path /mnt/nvme/kv --namespace 3f9a12bc --json --yes
    """
    from lmcache.tiers.disk import DiskTier

    folder = disk_folder(path)
    tallies = tally(folder)
    if namespace is not None:
        full = _complete(namespace, sorted(tallies))
        tallies = {full: tallies[full]}
    objects, nbytes = sum(t.objects for t in tallies.values()), sum(t.nbytes for t in tallies.values())
    what = f"{objects:,} objects ({human_bytes(nbytes)}) in {folder}"
    if not yes:
        if json:
            raise ConfigError("--json cannot ask for confirmation; add --yes")
        try:
            confirmed = typer.confirm(f"Remove {what}?")
        except typer.Abort:  # no terminal to ask at, or Ctrl-C
            confirmed = False
        if not confirmed:
            typer.echo("lmcache: not confirmed, nothing was removed; --yes removes without asking", err=True)
            raise typer.Exit(2)
    removed = 0
    if (folder / "objects").is_dir():  # otherwise opening the tier would create one
        tier = DiskTier(folder)
        try:
            removed = tier.clear() if namespace is None else sum(tier.clear(bytes.fromhex(name)) for name in tallies)
        finally:
            tier.close()
    if json:
        print_json({"path": str(folder), "namespaces": sorted(tallies), "removed": removed, "bytes": nbytes})
    else:
        print_line(f"removed {removed:,} objects from {folder}")


def _complete(prefix: str, names: list[str]) -> str:
    """Returns the only namespace that starts with `prefix`.

    Raises:
        ConfigError: none or several do.
    """
    found = [name for name in names if name.startswith(prefix.lower())]
    if len(found) == 1 and prefix:
        return found[0]
    shown = ", ".join(name[:16] for name in names) or "none"
    raise ConfigError(f"--namespace {prefix!r} matches {len(found)} namespaces, it must match one; there are: {shown}")
