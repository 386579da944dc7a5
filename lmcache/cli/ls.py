"""`lmcache ls`: lists the contents of the disk tier by namespace. Reads file names only and changes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from lmcache.cli.output import (
    JsonOption,
    PathOption,
    disk_folder,
    human_age,
    human_bytes,
    print_json,
    print_line,
    print_table,
)


@dataclass
class Tally:
    """Contents of one namespace. `oldest_s`, `newest_s`: seconds since the oldest and newest use (read or write) of an object."""

    namespace: str
    objects: int = 0
    nbytes: int = 0
    oldest_s: float = 0.0
    newest_s: float = float("inf")
    chunks: dict[bytes, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of all chunks; a chunk stored for several groups or ranks counts once."""
        return sum(self.chunks.values())

    def plain(self) -> dict[str, Any]:
        """Returns the namespace's entry in the JSON output."""
        return {
            "namespace": self.namespace,
            "objects": self.objects,
            "chunks": len(self.chunks),
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "oldest_s": round(self.oldest_s, 1),
            "newest_s": round(self.newest_s, 1),
        }


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(ls)


def ls(path: PathOption = None, json: JsonOption = False) -> None:
    """List the contents of the disk tier by namespace (one digest of model, numerics and tenant).

    \b
    Examples:
      lmcache ls
      lmcache ls --path /mnt/nvme/kv --json
    """
    folder = disk_folder(path)
    tallies = sorted(tally(folder).values(), key=lambda t: -t.nbytes)
    total = {
        "namespaces": len(tallies),
        "objects": sum(t.objects for t in tallies),
        "tokens": sum(t.tokens for t in tallies),
        "bytes": sum(t.nbytes for t in tallies),
    }
    if json:
        print_json({"path": str(folder), "total": total, "namespaces": [t.plain() for t in tallies]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("namespace", "objects", "tokens", "size", "last used", "oldest use"):
        table.add_column(title, justify="left" if title == "namespace" else "right", no_wrap=True)
    for t in tallies:
        ages = (human_age(t.newest_s), human_age(t.oldest_s))
        table.add_row(t.namespace[:16], f"{t.objects:,}", f"{t.tokens:,}", human_bytes(t.nbytes), *ages)
    if tallies:
        print_table(table)
    print_line(f"{total['objects']:,} objects, {total['tokens']:,} tokens, {human_bytes(total['bytes'])} in {folder}")


def tally(folder: Path) -> dict[str, Tally]:
    """Returns the contents by namespace (hex)."""
    from lmcache.tiers.folder import Passed, object_of, walk

    now = time.time()
    tallies: dict[str, Tally] = {}
    for entry in walk(str(folder / "objects"), passed=Passed()):
        id = None if entry.temp else object_of(entry)
        if id is None:
            continue
        name = id.namespace.hex()
        t = tallies.get(name) or tallies.setdefault(name, Tally(name))
        t.objects += 1
        t.nbytes += entry.size
        t.chunks[id.chain] = id.tokens
        age = max(0.0, now - entry.used)
        t.oldest_s, t.newest_s = max(t.oldest_s, age), min(t.newest_s, age)
    return tallies
