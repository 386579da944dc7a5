"""`lmcache bench kernels`: the GPU kernels, compiled ahead of time on any machine, or measured on a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from lmcache.cli.output import JsonOption, print_json, print_line


def kernels(
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile every kernel for every target and check the results; needs no GPU.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="With --aot: sm_80, sm_90, sm_100, gfx942; repeatable; default: all."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure the GPU kernels against the device's own copies, or inspect what they compile to.

    With --aot: prints each kernel's access widths, registers, spills and occupancy; exit status 1 if one misses its target.
    Without --aot: needs a GPU and prints GB/s; exit status 1 if the copied bytes are wrong.

    \b
    Examples:
      lmcache bench kernels --aot
      lmcache bench kernels --aot --target sm_90 --json
      lmcache bench kernels --json > kernels.json
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        _error(f"Triton cannot be imported ({error}); `pip install triton` installs it (Linux)")
        raise typer.Exit(1) from error
    if aot:
        _aot(target, json)
    elif target:
        raise typer.BadParameter("--target is only valid with --aot; without it, the GPU of this machine is measured")
    else:
        _measure(json)


def _aot(targets: list[str] | None, json: bool) -> None:
    from lmcache_kernels.aot import TARGETS, report, verdicts

    for name in targets or ():
        if name not in TARGETS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(TARGETS)}", param_hint="--target")
    found = []
    for one in report(targets or TARGETS):
        found.append(one)
        if not json:
            _line(asdict(one))
    if json:
        print_json([asdict(one) for one in found])
    failures = verdicts(found)
    for text in failures:
        _error(text)
    if failures:
        raise typer.Exit(1)


def _measure(json: bool) -> None:
    import torch

    from lmcache.bench.gpu import measure
    from lmcache_kernels.triton_copy import copy_rows

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        _error("no GPU found; `lmcache bench kernels --aot` compiles the kernels without one")
        raise typer.Exit(1)
    found = []
    for one in measure(device, copy_rows):
        found.append(one)
        if not json:
            _line(asdict(one))
    if json:
        print_json(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
                "torch": torch.__version__,
                "results": [asdict(one) for one in found],
            }
        )
    if not all(one.correct for one in found):
        _error("some copied bytes are wrong")
        raise typer.Exit(1)


def _line(row: dict[str, Any]) -> None:
    text = "  ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
    print_line(text)


def _error(text: str) -> None:
    typer.echo(text, err=True)
