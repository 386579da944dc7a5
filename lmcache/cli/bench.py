"""`lmcache bench`: the speed of the cache relative to the limits of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache.cli.bench_kernels import kernels
from lmcache.cli.output import JsonOption, folder_of, print_json, print_line
from lmcache.config import Config

if TYPE_CHECKING:
    from lmcache.bench.disk import DiskResult
    from lmcache.bench.lookup import LookupResult
    from lmcache.bench.paged import CanonicalResult, PagedResult

_PARTS = ("memory", "canonical", "disk", "lookup")

bench = typer.Typer(help="Speed of the cache on this machine, relative to the hardware's limits.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.add_typer(bench, name="bench")


bench.command()(kernels)


@bench.callback()
def _root() -> None:
    pass


@bench.command()
def io(
    part: Annotated[
        list[str] | None, typer.Option("--part", help=f"What to measure: {', '.join(_PARTS)}; repeatable.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Model shapes: smollm2-135m, 8b; repeatable.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", min=1, help="Number of threads; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions, and random blocks only.")] = False,
    folder: Annotated[
        str | None, typer.Option("--folder", metavar="FOLDER", help="Folder for the disk part; default: a tmpfs.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure paged KV ⇄ DRAM against memcpy, files against raw reads and writes, and lookups.

    A ratio of 1 means as fast as a plain copy of the same bytes. Times are the best of several; use an idle machine.

    memory: pages ⇄ objects in the same order. canonical: pages (vLLM's on a GPU: `packed`; on a CPU: `vec`, `amx`)
    ⇄ objects in canonical order: store, retrieve, and the translation of objects (unpack, pack).
    disk: object files. lookup: hashing and index lookup of a prompt.

    \b
    Examples:
      lmcache bench io
      lmcache bench io --part memory --model 8b --threads 1
      lmcache bench io --part canonical --quick
      lmcache bench io --json
    """
    from lmcache.bench.paged import SHAPES

    parts = _validated(part, _PARTS, "--part")
    models = _validated(model, tuple(SHAPES), "--model")
    out: dict[str, Any] = {"machine": _machine()}
    if "memory" in parts:
        out["memory"] = [asdict(result) for result in _shown(_memory(models, threads, quick), json)]
    if "canonical" in parts:
        out["canonical"] = [asdict(result) for result in _shown(_canonical(models, threads, quick), json)]
    if "disk" in parts:
        out["disk"] = [asdict(result) for result in _shown(_disk(models, folder_of(folder, "--folder"), quick), json)]
    if "lookup" in parts:
        out["lookup"] = [asdict(result) for result in _shown(_lookup(quick), json)]
    if json:
        print_json(out)


def _memory(models: list[str], threads: list[int] | None, quick: bool) -> Iterable[PagedResult]:
    from lmcache.bench.paged import LAYOUTS, PATTERNS, SHAPES, measure

    for name in models:
        for block_tokens in (16, 128):
            for layout in LAYOUTS:
                yield from measure(
                    SHAPES[name],
                    layout,
                    block_tokens=block_tokens,
                    threads=threads or (1, 2),
                    patterns=PATTERNS[:2] if quick else PATTERNS,
                    repeat=3 if quick else 9,
                )


def _canonical(models: list[str], threads: list[int] | None, quick: bool) -> Iterable[CanonicalResult]:
    from lmcache.bench.paged import PACKINGS, PAGES, SHAPES, measure_canonical

    for name in models:
        for packing in PACKINGS:
            for block_tokens in PAGES[packing]:
                yield from measure_canonical(
                    SHAPES[name],
                    packing,
                    block_tokens=block_tokens,
                    threads=threads or (1, 2),
                    tokens=1024 if quick else 2048,
                    repeat=3 if quick else 7,
                )


def _disk(models: list[str], folder: Path | None, quick: bool) -> Iterable[DiskResult]:
    from lmcache.bench.disk import measure
    from lmcache.bench.paged import SHAPES, pool, torch_threads

    with torch_threads(1):
        for name in models:
            shape = SHAPES[name]
            native = pool(shape, "packed", 16, Config.chunk_tokens).native(0, Config.chunk_tokens)
            for order in ("native", "canonical"):
                yield measure(
                    name,
                    shape.spec,
                    native,
                    order=order,
                    objects=4 if shape.layers * shape.kv_heads > 200 else 16,
                    folder=folder,
                    repeat=3 if quick else 7,
                )


def _lookup(quick: bool) -> Iterable[LookupResult]:
    from lmcache.bench.lookup import measure

    return measure(repeat=5 if quick else 20)


def _shown(results: Iterable[Any], json: bool) -> list[Any]:
    """Returns the results; without `--json`, prints each as soon as it is available."""
    finished = []
    for result in results:
        finished.append(result)
        if not json:
            row = asdict(result)
            text = (f"{key} {value:.2f}" if isinstance(value, float) else str(value) for key, value in row.items())
            print_line("  ".join(text))
    return finished


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch

    return {
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def _validated(wanted: list[str] | None, known: tuple[str, ...], option: str) -> list[str]:
    for name in wanted or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)
    return list(wanted or known)
