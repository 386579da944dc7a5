"""Implements `lmcache demo`: a growing chat about a long document, plain versus cached, and again after a restart.

Every cached answer is compared, tokens and logits bit for bit, with `Recomputation`: the plain model computing the same
prompt in the same split. The last round runs in a new process, with only the folder on disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmcache.config import Config
from lmcache.errors import ConfigError, LMCacheError
from lmcache_hf.model import CachedModel
from lmcache_hf.reference import Answer, Recomputation, answer

CHUNK_TOKENS = 64  # small, so that few tokens remain after the last whole chunk
QUESTIONS = (
    "In one sentence, what is this text about?",
    "Which rule does it state first? Answer briefly.",
    "Name one exception or special case that it mentions.",
    "Give a very short example of what it describes.",
    "What would you tell a beginner about it?",
)
TOPICS = ("execmodel", "class", "with", "try", "import", "exceptions", "naming", "function", "assignment", "types")


@dataclass(frozen=True)
class Options:
    """Command-line options. `model=None`: SmolLM2. `dtype="auto"`: bfloat16 if the hardware supports it natively."""

    model: str | None = None
    dtype: str = "auto"
    rounds: int = 4
    tokens: int = 3000
    max_new_tokens: int = 24
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Round:
    """One row of the table. TTFT = time to first token, in seconds."""

    round: int
    ttft_recompute_s: float
    ttft_cached_s: float
    hit_tokens: int
    identical: bool


@dataclass(frozen=True)
class Outcome:
    """All rounds, and the round after the restart."""

    rounds: tuple[Round, ...]
    restart: Round

    @property
    def identical(self) -> bool:
        """Whether every cached answer equals recomputation."""
        return all(r.identical for r in (*self.rounds, self.restart))

    def as_json(self) -> dict[str, Any]:
        """`{"rounds": […], "restart": {…}}`."""
        return {"rounds": [asdict(r) for r in self.rounds], "restart": asdict(self.restart)}


def run(options: Options, show: Callable[[str, Round | None], None]) -> Outcome:
    """Runs the whole demo.

    Args:
        options: see `Options`.
        show: called with a progress message and None, or with `""` and a finished round.

    Raises:
        ConfigError: the model cannot be loaded.
        UncachedError: the model cannot be cached.
    """
    with _folder(options.cache_dir) as folder:
        show("loading the model" + ("" if options.model else " (SmolLM2 is converted on the first run)"), None)
        path = model_path(options.model)
        model, tokenizer = load(path, options.dtype)
        chat = Chat(tokenizer, document(tokenizer, options.tokens))
        reference = Recomputation(model)
        rounds: list[Round] = []
        with CachedModel(model, cache_config(folder)) as cached:
            for number in range(1, options.rounds + 1):
                ids = chat.ask(QUESTIONS[(number - 1) % len(QUESTIONS)])
                hit = cached.hit_tokens(ids)
                show(f"round {number}: recomputing {len(ids)} tokens in the same split, to compare with", None)
                expected = reference.answer(ids, hit, options.max_new_tokens)
                show(f"round {number}: plain generate, {len(ids)} tokens", None)
                plain = answer(model, ids, options.max_new_tokens)
                show(f"round {number}: cached generate, {hit} of {len(ids)} tokens cached", None)
                before = cached.stats()["hit_tokens"]
                got = answer(cached, ids, options.max_new_tokens)
                used = cached.stats()["hit_tokens"] - before
                rounds.append(Round(number, plain.ttft_s, got.ttft_s, used, got.identical(expected) and used == hit))
                show("", rounds[-1])
                chat.reply(got.sequence[len(ids) :])
            show("flushing to disk", None)
            cached.flush()
        ids = chat.ask(QUESTIONS[options.rounds % len(QUESTIONS)])
        show("restart: a new process, with only the disk cache", None)
        restart = _restart(options, path, folder, ids, reference)
        show("", restart)
    return Outcome(tuple(rounds), restart)


# ------------------------------------------------------------------ the new process


def _restart(options: Options, path: str, folder: Path, ids: torch.Tensor, reference: Recomputation) -> Round:
    with tempfile.TemporaryDirectory(prefix="lmcache-demo-") as scratch:
        task, result = Path(scratch) / "task.json", Path(scratch) / "result.safetensors"
        task.write_text(
            json.dumps(
                {
                    "model": path,
                    "dtype": options.dtype,
                    "folder": str(folder),
                    "ids": ids.tolist(),
                    "max_new_tokens": options.max_new_tokens,
                    "result": str(result),
                }
            )
        )
        command = [sys.executable, "-c", "from lmcache.cli import main; main()", "demo", "--restart-task", str(task)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if done.returncode or not result.is_file():
            raise LMCacheError(f"the new process exited with status {done.returncode}: {done.stderr.strip()[-2000:]}")
        got, plain_ttft, hit = _read_result(result)
    expected = reference.answer(ids, hit, options.max_new_tokens)
    return Round(options.rounds + 1, plain_ttft, got.ttft_s, hit, got.identical(expected))


def continue_after_restart(task_file: Path) -> None:
    """Entry point of the new process: runs one round, plain and cached, and writes the results to a file for its parent."""
    from safetensors.torch import save_file

    task = json.loads(task_file.read_text())
    model, _ = load(task["model"], task["dtype"])
    ids = torch.tensor(task["ids"])
    new = int(task["max_new_tokens"])
    with CachedModel(model, cache_config(Path(task["folder"]))) as cached:
        answer(model, ids, 1)  # warm-up: a process's first run is slower, which would favour the cache
        plain = answer(model, ids, new)
        got = answer(cached, ids, new)
        hit = cached.stats()["hit_tokens"]
    times = torch.tensor([plain.ttft_s, got.ttft_s], dtype=torch.float64)
    tensors = {"sequence": got.sequence, "logits": got.logits, "ttft_s": times, "hit": torch.tensor(hit)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, task["result"])


def _read_result(file: Path) -> tuple[Answer, float, int]:
    from safetensors.torch import load_file

    found = load_file(file)
    plain, cached = found["ttft_s"].tolist()
    return Answer(found["sequence"], found["logits"], cached), plain, int(found["hit"])


# ------------------------------------------------------------------ model, document, chat


def cache_config(folder: Path) -> Config:
    """Returns the demo's settings; ignores the user's configuration, so that every run is comparable."""
    return Config(chunk_tokens=CHUNK_TOKENS, disk_path=folder, disk_bytes="8GiB", strict=True)


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="lmcache-demo-") as fresh:
        yield Path(fresh)


def model_path(model: str | None) -> str:
    """Returns the directory or hub id to load; SmolLM2's directory by default."""
    from lmcache_hf.models import smollm2

    local = smollm2() if model is None else Path(model).expanduser()
    return str(local) if local.exists() else str(model)


def load(path: str, dtype: str) -> tuple[Any, Any]:
    """Loads model (onto the GPU if there is one) and tokenizer.

    Raises:
        ConfigError: `path` is neither a model directory nor a hub id, or `dtype` is unknown.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging  # untyped
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    wanted = _best_dtype() if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise ConfigError(f"--dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=wanted)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _best_dtype() -> torch.dtype:
    """Returns bfloat16 if the hardware has instructions for it, else float32: emulated bfloat16 is slow."""
    if torch.cuda.is_available():
        return torch.bfloat16
    cpu = torch.cpu
    fast = any(getattr(cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if fast else torch.float32


def document(tokenizer: Any, tokens: int) -> str:
    """Returns the first `tokens` tokens of the Python language reference that ships with Python (`help("execmodel")`)."""
    from pydoc_data.topics import topics

    ordered = [*(t for t in TOPICS if t in topics), *(t for t in sorted(topics) if t not in TOPICS)]
    text, ids = "", []
    for topic in ordered:
        text += topics[topic] + "\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    return str(tokenizer.decode(ids[:tokens], skip_special_tokens=True))


class Chat:
    """A conversation about a document, rendered in full for each question, as chat applications do."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self._document = text
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> torch.Tensor:
        """Adds a question; returns the token ids of the whole chat up to where the model answers, 1-D."""
        content = question if self._messages else f"{self._document}\n\n{question}"
        self._messages.append({"role": "user", "content": content})
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(self._messages, tokenize=False, add_generation_prompt=True)
            return torch.tensor(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        text = "".join(f"{m['role'].title()}: {m['content']}\n\n" for m in self._messages) + "Assistant:"
        return torch.tensor(self._tokenizer(text)["input_ids"])

    def reply(self, ids: torch.Tensor) -> None:
        """Adds the model's answer."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": text.strip()})
