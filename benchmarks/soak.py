"""A soak: processes that share a disk folder store, load, clear and are killed at random, and every bit of every hit is checked.

Two folders are used. On the *roomy* one everything fits, so that what a flush vouched for must be found later unless it was
cleared. On the *tight* one processes with different limits evict each other's objects. One process on each folder lives
throughout; the others are killed with SIGKILL at random moments and started again. Meanwhile times of files are set to the past
and the future, files and folders of another user appear (if this runs as root), and a Hugging Face model generates on the roomy
folder, its answers compared with those of the plain model.

KV values are a function of the token ids up to their position and of the tenant, so every process can check any hit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHUNK = 16
CHUNKS = 8
PROMPTS = 240
SALTS = ("", "alice", "bob")
NOBODY = 65534
_START_S = 300.0
"""Seconds that workers may take to start; vLLM takes a minute on an idle machine."""

EXAMPLES = """\
examples:
  soak.py                                  one minute
  soak.py --minutes 30 --json > soak.json  progress on standard error
  soak.py --minutes 5 --vllm --seed 7      a vLLM engine on the roomy folder, too
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long [1]")
    parser.add_argument("--seed", type=int, default=1, help="of everything random [1]")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to standard error")
    parser.add_argument("--no-hf", action="store_true", help="without a Hugging Face model")
    parser.add_argument("--vllm", action="store_true", help="with a vLLM engine on the roomy folder")
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "OPTIONS", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        kind, given, seed = options.worker
        _WORKERS[kind](json.loads(given), int(seed))
        return
    scratch = Path(tempfile.mkdtemp(prefix="lmcache-soak-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        soak = Soak(scratch, options.seed, hf=not options.no_hf, vllm=options.vllm)
        outcome = soak.run(60 * options.minutes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json:
        print(json.dumps(outcome, indent=2))
    else:
        for name, value in outcome.items():
            print(f"{name}: {value}")
    sys.exit(0 if outcome["ok"] else 1)


# ---------------------------------------------------------------- the parent


class Process:
    """A worker, and the lines that came from it."""

    def __init__(self, kind: str, options: dict[str, Any], seed: int) -> None:
        self.kind, self.options, self.seed = kind, options, seed
        self.start()

    def start(self) -> None:
        """Starts it (again), with other random choices."""
        self.seed += 1000
        command = [sys.executable, __file__, "--worker", self.kind, json.dumps(self.options), str(self.seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._rest = b""
        self.ready = False

    def events(self) -> list[dict[str, Any]]:
        """Returns what it has said since the last call; the line that a kill cut off is dropped."""
        assert self._process.stdout is not None
        self._rest += self._process.stdout.read() or b""
        *lines, self._rest = self._rest.split(b"\n")
        found = [json.loads(line) for line in lines]
        self.ready = self.ready or bool(found)
        return found

    def tell(self, *command: Any) -> None:
        """Sends a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> int | None:
        """Waits until it has ended by itself; None: it did not."""
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


class Soak:
    """The run."""

    def __init__(self, scratch: Path, seed: int, *, hf: bool, vllm: bool) -> None:
        self._random = random.Random(seed)
        self._roomy, self._tight = scratch / "roomy", scratch / "tight"
        roomy = {"folder": str(self._roomy), "vouch": True}
        tight = {"folder": str(self._tight), "vouch": False}
        self._checker = Process("engine", {**roomy, "disk_bytes": "1GiB", "dram_bytes": 0, "idle": True}, seed)
        self._steady = [
            Process("engine", {**roomy, "disk_bytes": "2GiB"}, seed + 1),
            Process("engine", {**tight, "disk_bytes": "4MiB"}, seed + 2),
        ]
        self._mortal = [
            Process("engine", {**roomy, "disk_bytes": "3GiB"}, seed + 3),
            Process("engine", {**tight, "disk_bytes": "6MiB"}, seed + 4),
        ]
        if hf:
            self._mortal.append(Process("hf", roomy, seed + 5))
        if vllm:
            self._steady.append(Process("vllm", roomy, seed + 6))
        self._all = [self._checker, *self._steady, *self._mortal]
        self._counts: Counter[str] = Counter()
        self._vouched: dict[tuple[str, int], float] = {}
        self._cleared: dict[str, float] = {}
        self._sizes: dict[int, list[tuple[float, int, int]]] = {}
        self._ends: list[dict[str, Any]] = []
        self._problems: list[str] = []

    def run(self, seconds: float) -> dict[str, Any]:
        """Runs for so many seconds; returns the outcome."""
        until = time.monotonic() + _START_S
        while not all(process.ready for process in self._all):
            self._listen()
            if self._counts["crashes"] or time.monotonic() > until:
                raise RuntimeError(f"the workers did not start: {self._problems}")
            time.sleep(0.1)
        begun = time.monotonic()
        due = dict.fromkeys((self._kill, self._clear, self._check, self._shift_clock, self._intrude), begun)
        every = {self._kill: 10.0, self._clear: 4.0, self._check: 2.0, self._shift_clock: 0.5, self._intrude: 7.0}
        told = begun
        while (now := time.monotonic()) < begun + seconds:
            self._listen()
            for action, at in due.items():
                if now >= at:
                    due[action] = now + self._random.uniform(0.2, 1.8) * every[action]
                    action()
            if now >= told + 10:
                told = now
                print(f"{now - begun:.0f} s: {dict(self._counts)}", file=sys.stderr, flush=True)
            time.sleep(0.02)
        return self._finish(time.monotonic() - begun)

    # ------------------------------------------------------------ what happens at random

    def _kill(self) -> None:
        victim = self._random.choice(self._mortal)
        if victim.ready:
            self._note(victim, victim.events())
            victim.kill()
            self._counts["kills"] += 1
            victim.start()

    def _clear(self) -> None:
        """Has a living process clear a tenant or everything, and waits for it."""
        process = self._random.choice([p for p in self._steady if p.kind == "engine"])
        salt = self._random.choice([*SALTS, None])
        if process.options["vouch"]:  # what is vouched for from now on must have been stored after the clear
            self._vouched = {key: at for key, at in self._vouched.items() if salt not in (None, key[0])}
        self._ask(process, "clear", salt)
        if process.options["vouch"]:
            for one in SALTS if salt is None else (salt,):
                self._cleared[one] = time.monotonic()
            self._vouched = {key: at for key, at in self._vouched.items() if at > self._cleared.get(key[0], 0.0)}
        self._counts["clears"] += 1

    def _check(self) -> None:
        """Has a process without memory of its own load what flushes vouched for."""
        keys = self._random.sample(sorted(self._vouched), min(20, len(self._vouched)))
        self._verify(keys)

    def _verify(self, keys: Sequence[tuple[str, int]]) -> None:
        answer = self._ask(self._checker, "check", list(keys))
        for key, tokens in zip(keys, (answer or {}).get("tokens", []), strict=False):
            self._counts["vouched_checked"] += 1
            if tokens != CHUNK * CHUNKS:
                self._counts["lost"] += 1
                self._problems.append(f"lost: {key}: {tokens} of {CHUNK * CHUNKS} tokens, although a flush was true")

    def _shift_clock(self) -> None:
        """Sets the times of an object as another clock would have."""
        files = list((self._random.choice([self._roomy, self._tight]) / "objects").glob("*/*/*.safetensors"))
        if files:
            at = time.time() + self._random.choice([-1, 1]) * self._random.uniform(60, 10 * 365 * 86400)
            with_errors_ignored(os.utime, self._random.choice(files), (at, at))
            self._counts["clock_jumps"] += 1

    def _intrude(self) -> None:
        """Puts files and folders of another user where objects are."""
        if os.geteuid():
            return
        objects = self._random.choice([self._roomy, self._tight]) / "objects"
        space = objects / self._random.randbytes(32).hex()
        spaces = [path for path in objects.glob("*") if path.is_dir()] if objects.is_dir() else []
        try:
            if spaces and self._random.random() < 0.5:
                file = self._random.choice(spaces) / "00" / f"{'00' * 32}.0.L0-2.H0-2.0.16.safetensors"
                file.parent.mkdir(mode=0o700, exist_ok=True)
                file.write_bytes(b"not yours")
                os.chown(file, NOBODY, NOBODY)
            else:
                space.mkdir(mode=0o700)
                os.chown(space, NOBODY, NOBODY)
            self._counts["intrusions"] += 1
        except OSError:
            return

    # ------------------------------------------------------------ what the workers say

    def _listen(self) -> None:
        for process in self._all:
            self._note(process, process.events())
            if not process.alive:
                self._problems.append(f"a worker ended by itself: {process.kind} {process.options}")
                self._counts["crashes"] += 1
                process.start()

    def _note(self, process: Process, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            what = event.pop("what")
            if what == "counts":
                self._counts.update(event)
            elif what == "vouched":
                for number, salt, since in event["items"]:
                    if since > self._cleared.get(salt, 0.0):
                        self._vouched[salt, number] = since
            elif what == "size" and process not in self._mortal:
                size = time.monotonic(), event["rss"], event["handles"]
                self._sizes.setdefault(id(process), []).append(size)
            elif what == "wrong":
                self._counts["wrong"] += 1
                self._problems.append(f"wrong: {event['detail']}")
            elif what == "end":
                self._ends.append(event)
            elif what == "answer":
                self._answer = event

    def _ask(self, process: Process, *command: Any) -> dict[str, Any] | None:
        """Sends a command and waits for its answer; None: there was none within a minute."""
        self._answer: dict[str, Any] | None = None
        process.tell(*command)
        until = time.monotonic() + 60
        while self._answer is None:
            self._listen()
            if time.monotonic() > until:
                self._counts["stuck"] += 1
                self._problems.append(f"stuck: no answer to {command[0]!r} within a minute")
                return None
            time.sleep(0.005)
        return self._answer

    # ------------------------------------------------------------ the end

    def _finish(self, seconds: float) -> dict[str, Any]:
        self._verify(sorted(self._vouched))
        for process in self._all:
            process.tell("end")
        for process in self._all:
            status = process.end()
            self._note(process, process.events())
            if status != 0:
                self._counts["stuck" if status is None else "crashes"] += 1
                self._problems.append(f"at the end: {process.kind} {process.options}: status {status}")
        stuck = sum(end["stuck_slots"] for end in self._ends)
        growth = [self._growth(sizes) for sizes in self._sizes.values()]
        bad = damaged(self._roomy) + damaged(self._tight)
        outcome = {
            "seconds": round(seconds),
            **{name: self._counts[name] for name in ("wrong", "lost", "stuck", "crashes")},
            "stuck_slots": stuck,
            "damaged_files": bad,
            "rss_growth_mib": [round(rss / (1 << 20), 2) for rss, _ in growth],
            "handle_growth": [handles for _, handles in growth],
            "counts": dict(sorted(self._counts.items())),
            "problems": self._problems[:20],
        }
        fine = not (stuck or bad or any(self._counts[name] for name in ("wrong", "lost", "stuck", "crashes")))
        leaks = any(rss > 32 << 20 or handles > 4 for rss, handles in growth)
        return {"ok": fine and not leaks, **outcome}

    def _growth(self, sizes: Sequence[tuple[float, int, int]]) -> tuple[int, int]:
        """Returns growth of memory and handles: median of the last fifth of the time over that of the second fifth."""
        fifth = len(sizes) // 5
        if not fifth:
            return 0, 0
        early, late = sizes[fifth : 2 * fifth], sizes[-fifth:]
        middle = [sorted(size[i] for size in part)[len(part) // 2] for i in (1, 2) for part in (early, late)]
        return middle[1] - middle[0], middle[3] - middle[2]


def with_errors_ignored(call: Any, *arguments: Any) -> None:
    """Calls something on a file that may have gone."""
    try:
        call(*arguments)
    except OSError:
        return


def damaged(folder: Path) -> int:
    """Returns how many files of ours are damaged."""
    from lmcache.cli.verify import check
    from lmcache.tiers.folder import Passed, walk

    entries = [entry for entry in walk(str(folder / "objects"), passed=Passed(os.geteuid())) if not entry.temp]
    return len(check(entries, lambda nbytes: None)[0].bad)


# ---------------------------------------------------------------- workers


def say(what: str, **more: Any) -> None:
    """Tells the parent."""
    print(json.dumps({"what": what, **more}), flush=True)


def commands() -> list[list[Any]]:
    """Returns what the parent has said, without waiting. Exits if the parent is gone."""
    found = []
    while select.select([sys.stdin], [], [], 0)[0]:
        line = sys.stdin.readline()
        if not line:
            os._exit(1)
        found.append(json.loads(line))
        if found[-1][0] == "end":
            break
    return found


def size() -> dict[str, int]:
    """Returns this process's resident bytes and open handles."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "handles": len(os.listdir("/proc/self/fd"))}


class EngineWorker:
    """A `CacheEngine`, and tensors of its own."""

    LAYERS, HEADS, DIM, BLOCKS = 2, 2, 16, 64

    def __init__(self, options: dict[str, Any], seed: int) -> None:
        import torch

        from lmcache import CacheEngine, Config, KVSpec, Layout, PagedKV

        self._torch, self._random, self._vouches = torch, random.Random(seed), options["vouch"]
        spec = KVSpec.uniform(
            model="soak", layers=self.LAYERS, kv_heads=self.HEADS, head_dim=self.DIM, dtype=torch.bfloat16
        )
        shape = (self.BLOCKS, self.HEADS, CHUNK, 2 * self.DIM)
        self._pages = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(self.LAYERS)]
        self._kv = PagedKV(self._pages, Layout.parse("block head slot (kv dim)", block_tokens=CHUNK))
        config = Config(
            chunk_tokens=CHUNK,
            dram_bytes=options.get("dram_bytes", "2MiB"),
            disk_path=options["folder"],
            disk_bytes=options["disk_bytes"],
            admission="all",
            probe_timeout_s=30.0,
            load_timeout_s=60.0,
        )
        self.engine = CacheEngine(config, spec)
        self._stored: list[tuple[int, str, float]] = []
        self._counts: Counter[str] = Counter()

    def prompt(self, number: int) -> Any:
        """The tokens of a prompt: every third shares its first half with others."""
        tokens = [random.Random(number).randrange(50_000) for _ in range(CHUNK * CHUNKS)]
        if number % 3 == 0:
            tokens[: len(tokens) // 2] = [random.Random(-1 - number % 5).randrange(50_000)] * (len(tokens) // 2)
        return self._torch.tensor(tokens)

    def values(self, tokens: Any, salt: str) -> Any:
        """KV of all tokens as int16 (tokens, layers, heads, 2 × dim): of the tokens up to each, and the tenant."""
        torch = self._torch
        mixed = (tokens + 1) * 0x9E3779B97F4A7C1 + torch.arange(len(tokens)) * 0x632BE59BD9B4E01
        prefix = torch.cumsum(mixed ^ (mixed >> 29), 0) + torch.tensor(sum(salt.encode())) * 0x5851F42D4C957F2
        place = torch.arange(self.LAYERS * self.HEADS * 2 * self.DIM) * 0x14057B7EF767815 + 1
        mixed = prefix[:, None] * place[None, :]
        found = (mixed ^ (mixed >> 33)).to(torch.int16)
        return found.view(len(tokens), self.LAYERS, self.HEADS, 2 * self.DIM)

    def slots(self, tokens: int) -> Any:
        """Slots of scattered blocks."""
        blocks = self._torch.tensor(self._random.sample(range(self.BLOCKS), tokens // CHUNK))
        return (blocks[:, None] * CHUNK + self._torch.arange(CHUNK)[None, :]).flatten()

    def store(self, number: int, salt: str) -> None:
        """Stores a prompt from scattered slots, and overwrites them afterwards."""
        tokens, since = self.prompt(number), time.monotonic()
        slots, values = self.slots(len(tokens)), self.values(tokens, salt)
        for layer, pages in enumerate(self._pages):
            pages.view(self._torch.int16)[slots // CHUNK, :, slots % CHUNK] = values[:, layer]
        accepted = self.engine.store(tokens, self._kv, slots, salt=salt)
        for pages in self._pages:
            pages.view(self._torch.int16)[slots // CHUNK] = -1
        self._counts["stored_tokens"] += accepted
        if accepted == len(tokens):
            self._stored.append((number, salt, since))

    def load(self, number: int, salt: str) -> int:
        """Loads a prompt, checks every bit, and that no other slot has changed; returns how many tokens it got."""
        torch, tokens = self._torch, self.prompt(number)
        for pages in self._pages:
            pages.view(torch.int16).fill_(-2)
        slots = self.slots(len(tokens))
        with self.engine.lookup(tokens, salt=salt) as hit:
            loaded = self.engine.retrieve(hit, self._kv, slots[: hit.tokens]) if hit.tokens else 0
            found = hit.tokens
        want, at = self.values(tokens, salt), slots[:loaded]
        untouched = torch.ones(self.BLOCKS * CHUNK, dtype=torch.bool)
        untouched[slots[:found]] = False
        for layer, pages in enumerate(self._pages):
            raw = pages.view(torch.int16)
            if not torch.equal(raw[at // CHUNK, :, at % CHUNK], want[:loaded, layer]):
                say("wrong", detail=f"prompt {number} of {salt!r}, layer {layer}: {loaded} tokens were loaded")
            if not bool((raw.transpose(1, 2).flatten(0, 1)[untouched] == -2).all()):
                say("wrong", detail=f"prompt {number} of {salt!r}, layer {layer}: slots beyond the hit were written")
        self._counts["loads"] += 1
        self._counts["loaded_tokens"] += loaded
        return loaded

    def flush(self) -> None:
        """Flushes, and says what it vouches for."""
        result = self.engine.flush(durable=self._random.random() < 0.1)
        self._counts["true_flushes" if result else "false_flushes"] += 1
        if result and self._vouches:
            say("vouched", items=self._stored)
        self._stored = []

    def step(self) -> None:
        """Does something at random."""
        number, salt = self._random.randrange(PROMPTS), self._random.choice(SALTS)
        what = self._random.random()
        if what < 0.35:
            self.store(number, salt)
        elif what < 0.9:
            self.load(number, salt)
        else:
            self.flush()

    def obey(self, command: list[Any]) -> None:
        """Does what the parent says."""
        if command[0] == "clear":
            if command[1] is not None:
                self.engine.namespace(salt=command[1])
            self.engine.clear(command[1])
            say("answer")
        elif command[0] == "check":
            say("answer", tokens=[self.load(number, salt) for salt, number in command[1]])

    def end(self) -> int:
        """Flushes and closes; returns how many slots, jobs and leases are left in use."""
        self.engine.flush()
        stats = self.engine.stats()
        self.engine.close()
        return int(sum(stats[f"index_{name}"] for name in ("jobs", "leases", "slots_leaving")))

    def counts(self) -> dict[str, int]:
        """Returns what was counted since the last call."""
        found, self._counts = self._counts, Counter()
        return dict(found)


def run_engine(options: dict[str, Any], seed: int) -> None:
    """The main loop of a worker with a `CacheEngine`."""
    worker = EngineWorker(options, seed)
    say("ready")
    told = 0.0
    while True:
        for command in commands():
            if command[0] == "end":
                say("end", stuck_slots=worker.end())
                return
            worker.obey(command)
        if options.get("idle"):
            time.sleep(0.02)
        else:
            worker.step()
            time.sleep(0.005)
        if time.monotonic() > told + 1:
            told = time.monotonic()
            say("counts", **worker.counts())
            say("size", **size())


def run_hf(options: dict[str, Any], seed: int) -> None:
    """The main loop of a worker with a Hugging Face model: in float32 its greedy tokens are those of the plain model."""
    import torch

    from lmcache import Config
    from lmcache_conformance.labs.models import build
    from lmcache_hf import CachedModel

    torch.set_num_threads(1)
    model, chance = build("llama").float().eval(), random.Random(seed)
    config = Config(chunk_tokens=CHUNK, dram_bytes="4MiB", disk_path=options["folder"], disk_bytes="3GiB")
    plain: dict[int, Any] = {}
    with CachedModel(model, config) as cached:
        say("ready")
        while True:
            if any(command[0] == "end" for command in commands()):
                break
            number = chance.randrange(30)
            ids = torch.tensor([[random.Random(number % 6).randrange(3, 200) for _ in range(120)]])
            ids[0, 80:] = torch.tensor([random.Random(100 + number).randrange(3, 200) for _ in range(40)])
            arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            if number not in plain:
                plain[number] = model.generate(ids, **arguments)
            before = cached.stats()["hit_tokens"]
            answer = cached.generate(ids, **arguments)
            if not torch.equal(answer, plain[number]):
                say("wrong", detail=f"Hugging Face: prompt {number}: other tokens than without the cache")
            say("counts", hf_answers=1, hf_hit_tokens=int(cached.stats()["hit_tokens"] - before))
            time.sleep(0.2)
    say("end", stuck_slots=0)


def run_vllm(options: dict[str, Any], seed: int) -> None:
    """The main loop of a worker with vLLM: prompts again and again, vLLM's own prefix cache emptied in between."""
    from engine_process import EngineOptions, EngineProcess, model_folder, temporary_folder

    with temporary_folder():
        cache = {"chunk_tokens": 128, "dram_bytes": "64MiB", "disk_path": options["folder"], "disk_bytes": "3GiB"}
        engine_options = EngineOptions(model=model_folder(None), cache=cache, blocks=24, max_tokens=2048, threads=1)
        chance = random.Random(seed)
        with EngineProcess(engine_options, "soak") as engine:
            say("ready")
            while not any(command[0] == "end" for command in commands()):
                answer = engine.ask("one", seed=f"soak {chance.randrange(12)}", tokens=529, new=4, reset=True)
                say("counts", vllm_answers=1, vllm_hit_tokens=answer["cached"])
    say("end", stuck_slots=0)


_WORKERS = {"engine": run_engine, "hf": run_hf, "vllm": run_vllm}


if __name__ == "__main__":
    main()
