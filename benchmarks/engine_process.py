"""A vLLM engine in a process of its own, told what to do over a pipe: one engine computes while the others wait.

The parent never imports vLLM. Commands and answers are one JSON object a line; the child's standard output is kept for
them, whatever else it prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

THREADS = os.cpu_count() or 1
FIRST_WORD = 1000
"""Prompts are random token ids from here on: beyond the special tokens of any model."""


@dataclass(frozen=True)
class EngineOptions:
    """One engine.

    Attributes:
        model: folder of the model.
        cache: settings of our connector; None runs stock vLLM.
        blocks: vLLM's KV blocks of `block_tokens` tokens; its own prefix cache is on and has these.
        max_tokens: longest request, prompt and answer.
        batch_tokens, batch_requests: the most that vLLM computes in a step.
        threads: of OpenMP, not bound to cores.
    """

    model: str
    cache: dict[str, Any] | None
    blocks: int
    block_tokens: int = 128
    max_tokens: int = 8192
    batch_tokens: int = 8192
    batch_requests: int = 16
    threads: int = THREADS


@dataclass
class Answer:
    """One request: what it took from a cache (vLLM's or ours), and when its tokens came, in seconds."""

    cached: int = 0
    tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0


@dataclass
class Turn:
    """One round of one user: `prompt` tokens in, `new` out."""

    user: int
    round: int
    answer: Answer = field(default_factory=Answer)


def words(seed: str, count: int, vocabulary: int) -> list[int]:
    """`count` random token ids, the same for the same seed in every process."""
    found = random.Random(seed)
    return [found.randrange(FIRST_WORD, vocabulary) for _ in range(count)]


# ---------------------------------------------------------------- the parent's side


class EngineProcess:
    """Starts an engine and waits until it is ready. A context manager; on leaving it ends the engine."""

    def __init__(self, options: EngineOptions, name: str) -> None:
        self.name = name
        environment = dict(
            os.environ,
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS=str(options.threads),
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
        )
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        tell(f"{name}: starting an engine")
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts: dict[str, Any] = self._answer()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a method of `Engine` over there.

        Raises:
            RuntimeError: it failed; what went wrong is on standard error.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine {self.name!r} ended with status {self._process.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        """End the engine, whatever it is doing."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tell(text: str) -> None:
    """Progress, for people."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def fast_folder() -> str | None:
    """Where temporary folders go: memory if there is a writable tmpfs, else the default."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the disk tier, removed at the end."""
    return tempfile.TemporaryDirectory(prefix="lmcache-bench-", dir=fast_folder())


def model_folder(given: str | None) -> str:
    """The model named on the command line, else SmolLM2-135M in bfloat16."""
    if given:
        return given
    from lmcache_hf.models import smollm2

    return str(smollm2())


def rounded(value: Any, digits: int = 4) -> Any:
    """`value` with every float in it rounded."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def machine() -> dict[str, Any]:
    """Where the times come from."""
    import platform

    return {"cpus": os.cpu_count(), "load": [round(x, 2) for x in os.getloadavg()], "system": platform.platform()}


# ---------------------------------------------------------------- the child's side


class Engine:
    """vLLM, driven step by step. Every public method is a command."""

    def __init__(self, options: EngineOptions) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = None
        if options.cache is not None:
            transfer = KVTransferConfig(
                kv_connector="LMCacheConnector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"strict": True, **options.cache},
            )
        self._options = options
        self._llm = LLM(
            model=options.model,
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_model_len=options.max_tokens,
            max_num_batched_tokens=options.batch_tokens,
            max_num_seqs=options.batch_requests,
            block_size=options.block_tokens,
            num_gpu_blocks_override=options.blocks,
            seed=0,
            disable_log_stats=True,
            kv_transfer_config=transfer,
        )
        self._engine: Any = self._llm.llm_engine
        self._core: Any = self._engine.engine_core.engine_core
        self._vocabulary = int(self._engine.model_config.get_vocab_size())
        self._number = 0

    def facts(self) -> dict[str, Any]:
        """What was started."""
        import torch
        import vllm

        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "block_tokens": self._options.block_tokens,
            "blocks": self._options.blocks,
            "kv_tokens": (self._options.blocks - 1) * self._options.block_tokens,
            "connector": self._options.cache is not None,
        }

    # ------------------------------------------------------------ commands

    def one(self, seed: str, tokens: int, new: int = 1, reset: bool = False) -> dict[str, Any]:
        """One prompt alone. `reset`: vLLM's own prefix cache is emptied before."""
        if reset:
            self.reset()
        [answer] = self._together([words(seed, tokens, self._vocabulary)], new)
        self.settle()
        return asdict(answer)

    def batch(self, seeds: Sequence[str], tokens: int, new: int) -> dict[str, Any]:
        """Prompts all at once: seconds to the last token, and until everything is written."""
        prompts = [words(seed, tokens, self._vocabulary) for seed in seeds]
        began = time.perf_counter()
        answers = self._together(prompts, new)
        seconds = time.perf_counter() - began
        self.settle()
        drained = time.perf_counter() - began
        cached, generated = sum(a.cached for a in answers), sum(a.tokens for a in answers)
        return {"seconds": seconds, "drained_s": drained, "cached": cached, "tokens": generated}

    def chat(self, users: int, rounds: int, first: int, more: int, new: int, seed: str) -> dict[str, Any]:
        """`users` at once, each with `rounds` rounds: its whole history, `more` new tokens (`first` in round 0), an answer."""
        histories = [words(f"{seed} {user} 0", first, self._vocabulary) for user in range(users)]
        turns: dict[str, tuple[Turn, float]] = {}
        done: list[Turn] = []

        def ask(user: int, number: int) -> None:
            name = self._add(histories[user], new)
            turns[name] = (Turn(user, number), time.perf_counter())

        began = time.perf_counter()
        for user in range(users):
            ask(user, 0)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                turn, since = turns[output.request_id]
                _note(turn.answer, output, time.perf_counter() - since)
                if not output.finished:
                    continue
                _check(output, new)
                done.append(turn)
                user, following = turn.user, turn.round + 1
                if following < rounds:
                    text = words(f"{seed} {user} {following}", more, self._vocabulary)
                    histories[user] = [*histories[user], *output.outputs[0].token_ids, *text]
                    ask(user, following)
        seconds = time.perf_counter() - began
        self.settle()
        return {"seconds": seconds, "turns": [asdict(turn) for turn in done]}

    def settle(self) -> None:
        """Step until nothing is left to be written."""
        until = time.monotonic() + 60
        while self._core.scheduler.has_requests():
            self._core.step()
            if time.monotonic() > until:
                raise RuntimeError("the engine has no requests left and still finds work")

    def reset(self) -> None:
        """Empty vLLM's own prefix cache."""
        self.settle()
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM refuses to reset its prefix cache")

    def memcpy(self, nbytes: int, repeat: int = 9) -> float:
        """GB/s of one copy of so many bytes with torch's threads, the best of several."""
        import torch

        source = torch.ones(nbytes, dtype=torch.uint8)
        target = torch.ones(nbytes, dtype=torch.uint8)
        best = float("inf")
        for _ in range(repeat):
            began = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - began)
        return nbytes / best / 1e9

    def counters(self) -> dict[str, float]:
        """Our connector's own counts, of both halves."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        found: dict[str, float] = {}
        connector = self._core.scheduler.connector
        halves = [] if connector is None else [connector._scheduler]
        if has_kv_transfer_group():
            halves.append(get_kv_transfer_group()._worker)
        for half in halves:
            for name, value in half.metrics.snapshot().items():
                found[name] = found.get(name, 0.0) + value
        return {name: value for name, value in found.items() if value}

    # ------------------------------------------------------------ the rest

    def _add(self, prompt: Sequence[int], new: int) -> str:
        from vllm import SamplingParams

        self._number += 1
        name = str(self._number)
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        return name

    def _together(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        answers: dict[str, tuple[Answer, float]] = {}
        for prompt in prompts:
            began = time.perf_counter()
            answers[self._add(prompt, new)] = (Answer(), began)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                answer, began = answers[output.request_id]
                _note(answer, output, time.perf_counter() - began)
                if output.finished:
                    _check(output, new)
        return [answer for answer, _ in answers.values()]

    def close(self) -> None:
        """Write out what waits and end the engine."""
        self.settle()
        self._core.shutdown()


def _note(answer: Answer, output: Any, seconds: float) -> None:
    tokens = len(output.outputs[0].token_ids)
    if tokens and not answer.tokens:
        answer.first_s = seconds
    answer.tokens, answer.total_s = tokens, seconds
    answer.cached = int(output.num_cached_tokens or 0)


def _check(output: Any, new: int) -> None:
    done = output.outputs[0]
    if len(done.token_ids) != new or done.finish_reason != "length":
        raise RuntimeError(f"{len(done.token_ids)} tokens, finished with {done.finish_reason!r}; {new} were asked for")


def _serve(options: EngineOptions, commands: IO[str], reply: Callable[[Any], None]) -> None:
    engine = Engine(options)
    reply(engine.facts())
    for line in commands:
        command, arguments = json.loads(line)
        reply(getattr(engine, command)(**arguments))
    engine.close()


def _child(options: str) -> None:
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: Any) -> None:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()

    _serve(EngineOptions(**json.loads(options)), sys.stdin, reply)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
        sys.exit(f"{Path(__file__).name} is started by the benchmarks beside it")
    _child(sys.argv[1])
