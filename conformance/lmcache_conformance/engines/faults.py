"""Level `faults`: damaged files, full disks, killed processes. Responses stay correct, nothing hangs, flushed KV survives."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lmcache_conformance.contract import Level, Request, Response
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, Case, Engine, on, same_answer, same_tokens
from lmcache_conformance.labs.damage import DAMAGES, object_files, problem_of
from lmcache_conformance.labs.models import REAL
from lmcache_conformance.runner.failures import EngineFailure
from lmcache_conformance.runner.marks import level, requires


def small(case: Case) -> Mapping[str, Any]:
    """Returns settings with DRAM for about twenty chunks, so that after a long prompt earlier ones are loaded from disk."""
    return {"dram_bytes": 1, "queue_bytes": "32MiB" if case.model in REAL else "1MiB"}


class FaultTests(EngineBase):
    """Faults of storage and processes."""

    # ---------------------------------------------------------------- damaged files

    @level(Level.FAULTS)
    @requires("restart")
    @on("llama", "gemma3", dtypes=1)
    def test_files_damaged_between_two_processes_are_misses(self, bench: Bench) -> None:
        disk = bench.new_folder()
        prompts: dict[str, tuple[int, ...]] = {}
        cold: dict[str, Response] = {}
        files: dict[str, list[Path]] = {}
        with bench.open(dram_bytes="64MiB", disk_path=str(disk)) as engine:
            for kind in ("none", *DAMAGES):
                prompts[kind] = bench.chunks(4)
                known = set(object_files(disk))
                cold[kind] = engine.ask(prompts[kind])
                engine.flush()
                files[kind] = [path for path in object_files(disk) if path not in known]
                assert files[kind], "nothing was written"
        for kind, damage in DAMAGES.items():
            damage(files[kind], bench.rng)
            assert all(not path.exists() or problem_of(path) for path in files[kind]), f"{kind}: a file is still intact"
        with bench.open(dram_bytes="64MiB", disk_path=str(disk), history=engine.history) as engine:
            assert engine.ask(prompts["none"]).hit > 0, "no hit on intact files"
            for kind in DAMAGES:
                response = engine.ask(prompts[kind])
                what = f"all files of a prompt damaged ({kind})"
                assert response.hit == 0, f"{what}: reported as a hit of {dict(response.cached)}"
                same_answer(response, cold[kind], f"{what}, recomputed in one shot")
                again = engine.ask(prompts[kind])
                assert again.hit > 0, f"{what}: the recomputed KV was not stored again"
                same_tokens(again, engine.recompute(prompts[kind]), f"{what}, second request")

    @level(Level.FAULTS)
    @requires("restart")
    @on("llama", "gemma3", dtypes=1)
    def test_files_damaged_under_a_running_engine_are_recomputed_from(self, bench: Bench, full: bool) -> None:
        """Damages two files in the middle of a prompt: the KV before them may be used, the KV after them must not."""
        disk = bench.new_folder()
        kinds = (
            list(DAMAGES)
            if full
            else ["bit flipped in the payload", "payload cut short", "deleted", "swapped with others"]
        )
        with bench.open(disk_path=str(disk), **small(bench.case)) as engine:
            for kind in kinds:
                known = set(object_files(disk))
                prompt = bench.chunks(12)
                engine.ask(prompt)
                engine.flush()
                mine = [path for path in object_files(disk) if path not in known]
                engine.ask(bench.chunks(40), max_new_tokens=1)  # evicts the prompt from DRAM
                engine.flush()
                assert len(mine) > 2, f"only {len(mine)} files were written for a prompt of {len(prompt)} tokens"
                start = bench.rng.randrange(len(mine) - 2)
                DAMAGES[kind](mine[start : start + 2], bench.rng)
                engine.drop_device_cache()
                for occasion in ("first request", "second request"):
                    response = engine.ask(prompt)
                    bench.right(engine, prompt, response, f"two files in the middle damaged ({kind}), {occasion}")

    # ---------------------------------------------------------------- no space, no folder

    @level(Level.FAULTS)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_a_full_disk_costs_hits_and_recovers(self, bench: Bench) -> None:
        disk = bench.new_folder("full")
        with (
            _small_disk(disk, 64 if bench.case.model in REAL else 4) as filler,
            bench.open(disk_path=str(disk), **small(bench.case)) as engine,
        ):
            for number in range(4):
                prompt = bench.chunks(12)
                for occasion in ("first request", "second request"):
                    bench.right(engine, prompt, engine.ask(prompt), f"disk full, prompt {number + 1}, {occasion}")
            filler.unlink()
            self._stores_again(bench, engine, disk)

    def _stores_again(self, bench: Bench, engine: Engine, disk: Path) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            known = set(object_files(disk))
            engine.ask(bench.chunks(2))
            engine.flush()
            if set(object_files(disk)) - known:
                return
            time.sleep(0.5)
        raise AssertionError("nothing was written within 30 s after a full disk had space again")

    @level(Level.FAULTS)
    @on("llama", dtypes=1)
    def test_an_unusable_folder_costs_hits_but_not_correctness(self, bench: Bench) -> None:
        file = bench.new_folder("file")
        file.write_text("not a folder")
        with bench.open(dram_bytes="64MiB", disk_path=str(file / "below")) as engine:
            prompt = bench.chunks(4)
            for occasion in ("first request", "second request"):
                bench.right(engine, prompt, engine.ask(prompt), f"no folder, {occasion}")
            engine.flush()

    # ---------------------------------------------------------------- kill −9

    @level(Level.FAULTS)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_after_kill9_flushed_kv_is_served_and_no_file_is_damaged(self, bench: Bench, full: bool) -> None:
        disk = bench.new_folder()
        history = None
        flushed: list[tuple[tuple[int, ...], Response]] = []
        for delay in (0.02, 0.1, 0.3, 0.6) if full else (0.05, 0.3):
            with bench.open(dram_bytes="64MiB", disk_path=str(disk), history=history) as engine:
                history = engine.history
                for prompt, cold in flushed:
                    response = engine.ask(prompt)
                    assert response.hit >= bench.whole(len(prompt) - 1), (
                        f"a hit of only {dict(response.cached)} on a prompt that was flushed before kill −9"
                    )
                    if bench.case.exact:
                        same_tokens(response, cold, "a prompt flushed before kill −9")
                prompt = bench.chunks(6)
                flushed.append((prompt, engine.ask(prompt)))
                engine.flush()
                self._killed_while_storing(bench, engine, delay)
        broken = {path.name: problem for path in object_files(disk) if (problem := problem_of(path))}
        assert not broken, f"kill −9 left damaged files under their final names: {broken}"

    def _killed_while_storing(self, bench: Bench, engine: Engine, delay: float) -> None:
        requests = [Request(tokens=bench.chunks(30), max_new_tokens=4) for _ in range(8)]
        for request in requests:
            engine.history.add(request, Response())

        def store() -> None:
            with contextlib.suppress(EngineFailure):
                for request in requests:
                    engine.session.generate([request])

        thread = threading.Thread(target=store)
        thread.start()
        thread.join(delay)
        engine.kill9()
        thread.join()


@contextlib.contextmanager
def _small_disk(place: Path, mib: int) -> Iterator[Path]:
    """Mounts an almost full file system of `mib` MiB at `place`; yields the file that fills it. Skips if mounting fails."""
    place.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        filler = place / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            file.write(bytes(mib * 2**20 - 300_000))
        yield filler
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)
