"""`lmcache bench kernels`: the GPU kernels, compiled ahead of time anywhere, measured where there is a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from lmcache.cli.output import JsonOption, console, print_json


def kernels(
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile every kernel for every target, and judge; needs no GPU.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="With --aot: sm_80, sm_90, sm_100, gfx942; may be repeated; default all."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """The GPU kernels: GB/s against the device's own copies, or what they compile to.

    With --aot, each kernel's access widths, registers, spills and occupancy, and exit status 1 if one of them is worse than
    it must be. Without it, a GPU is needed, and exit status 1 means that bytes did not arrive as they left.

    \b
    Examples:
      lmcache bench kernels --aot
      lmcache bench kernels --aot --target sm_90 --json
      lmcache bench kernels --json > kernels.json
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        _complain(f"Triton cannot be imported ({error}); `pip install triton` brings it (Linux)")
        raise typer.Exit(1) from error
    if aot:
        _aot(target, json)
    elif target:
        raise typer.BadParameter("targets are compiled for with --aot; what is measured is the GPU that is here")
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
    bad = verdicts(found)
    for text in bad:
        _complain(text)
    if bad:
        raise typer.Exit(1)


def _measure(json: bool) -> None:
    import torch

    from lmcache.bench.gpu import measure
    from lmcache_kernels.triton_copy import copy_rows

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        _complain("no GPU here; `lmcache bench kernels --aot` compiles the kernels without one")
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
        _complain("some bytes did not arrive as they left")
        raise typer.Exit(1)


def _line(row: dict[str, Any]) -> None:
    text = "  ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
    console().print(text, markup=False, soft_wrap=True)


def _complain(text: str) -> None:
    typer.echo(text, err=True)
