"""`lmcache simulate`: what a cache of a given size would have achieved on recorded traffic."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache.cli.output import JsonOption, console, human_bytes, print_json, print_table
from lmcache.config import Config
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from lmcache.simulate.run import Result
    from lmcache.simulate.trace import Trace

_PERCENTS = (1, 2, 5, 10, 20)
_CAPACITIES = ",".join(f"{percent}%" for percent in _PERCENTS)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(simulate)


def simulate(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE…", help="Mooncake or `record_trace` files.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="LIST",
            help="Eviction policies, e.g. lru,adaptive. Default: all policies and baselines.",
        ),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            "--capacity",
            metavar="LIST",
            help=f"DRAM capacities: sizes, or shares of the distinct chunks [{_CAPACITIES}].",
        ),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option("--tiers", metavar="LIST", help="Capacities of device, dram and disk, e.g. dram=5%,disk=200GiB."),
    ] = None,
    admit: Annotated[
        str,
        typer.Option(
            "--admit", help="What is written to a full disk: adaptive, all (write-through), second, break-even."
        ),
    ] = Config.admission,
    model: Annotated[str, typer.Option("--model", help="Model shape, for bytes and prefill time.")] = "llama-3-8b",
    device: Annotated[str, typer.Option("--device", help="GPU type, for times.")] = "h100",
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs per engine.")] = 1,
    servers: Annotated[
        int | None, typer.Option("--servers", help="Engines; default: as many as would be 80 % busy without a cache.")
    ] = None,
    kv_bytes_per_token: Annotated[int | None, typer.Option(help="Overrides the model's value.")] = None,
    prefill_tokens_per_second: Annotated[
        float | None, typer.Option(help="Measured value; overrides the estimate.")
    ] = None,
    block_tokens: Annotated[
        int, typer.Option("--block-tokens", min=1, help="Tokens per block of Mooncake files, which do not contain it.")
    ] = 512,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip lines that are not valid requests.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.html", help="Write a printable HTML page.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Simulate a cache on a trace: hit rates, prefill saved, bytes moved, waiting times. Needs no KV and no model.

    Policies run in the real control plane. `optimum` and `lru-textbook` are the baselines of the literature, which treat
    chunks as independent; `optimum-chained` evicts the end of a prompt before its beginning, as the control plane does.

    \b
    Examples:
      lmcache simulate trace.jsonl
      lmcache simulate trace.jsonl --policy lru --policy optimum --capacity 5%,20GiB --json
      lmcache simulate trace.jsonl --tiers dram=5%,disk=50% --admit second --model llama-3-70b --gpus 4
      lmcache simulate a.jsonl b.jsonl --plot capacity.html
    """
    from lmcache.config.settings import named
    from lmcache.simulate.hardware import profile
    from lmcache.simulate.run import ADMISSIONS, PLACES, known_policies, simulate
    from lmcache.simulate.trace import read_traces

    asked = [name.strip() for names in policy or () for name in names.split(",")]
    policies = ["adaptive" if name == "density" else name for name in asked]  # the former name, as in `Config`
    for name in policies:
        named(name, known_policies(), "policy")
    named(admit, ADMISSIONS, "admission")
    if plot is not None and plot.suffix != ".html":
        raise ConfigError(f"--plot {str(plot)!r}: give a name that ends in .html")
    if plot is not None and not plot.parent.is_dir():
        raise ConfigError(f"--plot {str(plot)!r}: there is no folder {str(plot.parent)!r}; make it first")
    setup = profile(model, device, gpus=gpus, kv_bytes=kv_bytes_per_token, rate=prefill_tokens_per_second)
    if servers is not None and servers < 1:
        raise ConfigError(f"--servers {servers}: give at least one")
    fixed: dict[str, str] = {}
    for part in tiers.split(",") if tiers else ():
        place, size = (text.strip() for text in part.partition("=")[::2])
        named(place, dict.fromkeys(PLACES), "tier")
        if place in fixed:
            raise ConfigError(f"--tiers {tiers!r} gives {place} twice; drop one of them")
        fixed[place] = size
    if capacity is not None and "dram" in fixed:
        raise ConfigError("--capacity is the capacity of DRAM, which --tiers gives too; drop one of them")
    trace = read_traces(traces, skip_bad=skip_bad, block_tokens=block_tokens)
    chunk = setup.kv_bytes * trace.chunk_tokens
    sizes = {place: chunks_of(size, trace, chunk, f"--tiers {place}") for place, size in fixed.items()}
    grid = [sizes]
    if "dram" not in fixed:
        if capacity is not None:
            rooms = [chunks_of(size.strip(), trace, chunk, "--capacity") for size in capacity.split(",")]
        else:  # of a small trace, the smallest shares are less than a chunk, or the same number of chunks
            rooms = list(dict.fromkeys(max(1, trace.blocks * percent // 100) for percent in _PERCENTS))
        grid = [{**sizes, "dram": room} for room in rooms]
    _note(f"{len(trace)} requests, {trace.accesses} chunks of {trace.chunk_tokens} tokens, {trace.blocks} distinct")
    if trace.skipped:
        _note(f"{trace.skipped} bad lines skipped")
    gc.freeze()  # the trace is kept: exclude it from garbage collection
    results = []
    for capacities in grid:
        for name in policies or known_policies():
            results.append(
                simulate(trace, name, capacities, setup, servers=servers, admit=admit, progress=_progress_of(name))
            )
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr)
    about = {
        "trace": ", ".join(path.name for path in traces),
        "requests": len(trace),
        "accesses": trace.accesses,
        "distinct_chunks": trace.blocks,
        "chunk_tokens": trace.chunk_tokens,
        "chunk_bytes": chunk,
        "skipped_lines": trace.skipped,
        "model": model,
        "device": device,
        "admit": admit,
    }
    if json:
        print_json({"trace": about, "results": [result.as_json() for result in results]})
    else:
        _table(results)
    if plot is not None:
        from lmcache.simulate.page import page

        plot.write_text(page(about, results), encoding="utf-8")
        _note(f"wrote {plot}")


def chunks_of(text: str, trace: Trace, chunk_bytes: int, option: str) -> int:
    """Converts a capacity to chunks: `5%` or `0.05` of the distinct chunks, or a size in bytes such as `20GiB`."""
    from lmcache.config.settings import parse_size

    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text)
    if match and (match[2] or "." in text):
        share = float(match[1]) / (100 if match[2] else 1)
        chunks = round(share * trace.blocks * 1e6) // 1_000_000
    else:
        try:
            chunks = parse_size(text) // chunk_bytes
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}; or a share of the distinct chunks, such as 5%") from None
    if chunks < 1:
        raise ConfigError(
            f"{option}: {text!r} is less than one chunk of {human_bytes(chunk_bytes)} "
            f"(the trace has {trace.blocks} distinct ones); give more"
        )
    return chunks


def _table(results: list[Result]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("policy", no_wrap=True)
    disk = any("disk" in result.capacities for result in results)
    for title in ("capacity", "hit %", "tokens %", "saved s", "loaded", "p50 s", "p99 s"):
        table.add_column(title, justify="right", no_wrap=True)
    if disk:
        table.add_column("disk writes", justify="right", no_wrap=True)
    for r in results:
        row = [r.policy, human_bytes(r.capacity_bytes)]
        row += [f"{100 * rate:.2f}" for rate in (r.hit_rate, r.hit_rate_tokens)]
        row += [f"{r.prefill_saved_s:.0f}", human_bytes(sum(r.bytes_loaded.values()))]
        row += [f"{r.ttft_p50_s:.3f}", f"{r.ttft_p99_s:.3f}"]
        table.add_row(*row, *([human_bytes(r.disk_written_bytes)] if disk else []))
    print_table(table)
    console().print(
        f"p50, p99: time to first token. Prefill without a cache: {results[0].prefill_s + results[0].prefill_saved_s:.0f} s; "
        f"waiting times are for {results[0].servers} engines, first come, first served, one prompt at a time."
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _progress_of(name: str) -> Callable[[int], None]:
    def show(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {done} requests", end="", file=sys.stderr, flush=True)

    return show
