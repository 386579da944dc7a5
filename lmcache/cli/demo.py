"""`lmcache demo`: a real model answers questions on a long document without and with the cache, and after a restart."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache.cli.output import JsonOption, console, folder_of, print_json
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lmcache_hf.demo import Options, Outcome, Round


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(demo)


def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH_OR_HUB_ID", help="A causal language model [SmolLM2-135M-Instruct]."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: bfloat16 if the processor supports it.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Number of questions before the restart.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the document in tokens.")] = 3000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer in tokens.")] = 24,
    cache_dir: Annotated[
        str | None, typer.Option(help="Folder of the cache. Default: a temporary one, removed at the end.")
    ] = None,
    json: JsonOption = False,
    restart_task: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Chat with a model about a long document, with and without the cache, and check that the answers are equal.

    TTFT is the time to first token. Every cached answer is compared, tokens and logits bit for bit, with recomputation
    in the same split; the last one is computed in a new process that has only the files on disk. Exit status 1 if
    anything differs.

    \b
    Examples:
      lmcache demo
      lmcache demo --model HuggingFaceTB/SmolLM2-360M-Instruct --dtype float32
      lmcache demo --tokens 6000 --rounds 3 --json
    """
    if util.find_spec("transformers") is None:
        raise ConfigError("the demo needs Hugging Face transformers: pip install 'lmcache-sdk[hf]'")
    if model is None or Path(model).expanduser().exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import of transformers; inherited by the new process
    from lmcache_hf.demo import Options, continue_after_restart, run

    if restart_task is not None:
        continue_after_restart(restart_task)
        return
    options = Options(model, dtype, rounds, tokens, max_new_tokens, folder_of(cache_dir, "--cache-dir"))
    outcome = run(options, lambda text, done: None) if json else _run_live(options)
    if json:
        print_json(outcome.as_json())
    if not outcome.identical:
        raise typer.Exit(1)


def _run_live(options: Options) -> Outcome:
    from rich.live import Live
    from rich.text import Text

    from lmcache_hf.demo import run

    finished: list[Round] = []
    out = console()
    with Live(console=out, auto_refresh=True) as live:

        def show(text: str, done: Round | None) -> None:
            if done is not None:
                finished.append(done)
            live.update(_render(finished, text, options))

        try:
            outcome = run(options, show)
        except BaseException:  # the message about it begins on a line of its own
            live.update(_render(finished, "", options) if finished else "")
            raise
        live.update(_render(finished, "", options))
    if outcome.identical:
        out.print(
            Text("Every cached answer is identical to recomputation in the same split: tokens and logits.", "green"),
            soft_wrap=True,
        )
    else:
        bad = ", ".join(_label(r, options) for r in finished if not r.identical)
        out.print(Text(f"Different from recomputation in the same split: round {bad}.", "bold red"))
    return outcome


def _render(finished: list[Round], text: str, options: Options) -> RenderableType:
    from rich.console import Group
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title="Time to first token", title_justify="left")
    table.add_column("round", overflow="fold")
    for name in ("tokens from cache", "recomputed", "cached", "speed-up"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("identical")
    for r in finished:
        mark = Text("yes", "green") if r.identical else Text("NO", "bold red")
        ratio = f"{r.ttft_recompute_s / r.ttft_cached_s:.1f} ×"
        times = (f"{r.ttft_recompute_s * 1000:,.0f} ms", f"{r.ttft_cached_s * 1000:,.0f} ms")
        table.add_row(_label(r, options), f"{r.hit_tokens:,}", *times, ratio, mark)
    parts: list[Any] = [table, Spinner("dots", Text(text))] if text else [table]
    return Group(*parts)


def _label(r: Round, options: Options) -> str:
    return str(r.round) if r.round <= options.rounds else "restart"
