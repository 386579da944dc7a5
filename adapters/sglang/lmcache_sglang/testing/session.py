"""The conformance suite's sessions with SGLang: a real `Engine` with its processes, an instrumented storage, and recomputation.

Recomputation runs on the same engine with the storage bypassed: SGLang's radix tree is emptied, then the passes that computed
a prompt's KV are replayed, each in its original split.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.io_struct import GenerateReqInput

from lmcache_conformance.contract import Request, Response, SessionConfig
from lmcache_conformance.labs.splits import Pass, Splits, Start, refill
from lmcache_sglang.launch import BACKEND
from lmcache_sglang.testing.environment import on_cpu
from lmcache_sglang.testing.observed import ADDRESS

PAGE = 16
_TOKENS = 8192
_TOP = 20
"""Log-probs compared per token."""

_DRAIN_S = 60.0

ON_CPU: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
}
HICACHE_ON_CPU: Mapping[str, Any] = {"hicache_io_backend": "direct", "hicache_mem_layout": "page_first_direct"}


class SGLangSession:
    """One engine with HiCache. Deliberately broken adapters replace `storage`."""

    storage = "lmcache_sglang.testing.observed:ObservedStorage"
    salt = "extra_key"
    """Which of SGLang's two request fields separates tenants."""

    def __init__(self, config: SessionConfig) -> None:
        options = config.options
        page = int(options.get("page_tokens", PAGE))
        ranks = int(options.get("tensor_parallel", 1))
        step = int(options.get("prefill_tokens", 0))
        steps = {"chunked_prefill_size": -(-step // page) * page} if step else {}  # at least one page
        module, _, name = str(options.get("storage", self.storage)).partition(":")
        sys.path[:0] = [path for path in [options.get("path")] if path]  # where `storage` is found
        if ranks > 1 and on_cpu():
            os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
        os.environ[ADDRESS] = f"lmcache-sglang-{os.getpid()}"
        if multiprocessing.get_start_method(allow_none=True) != "fork" and on_cpu():
            _fork_instead_of_spawning()
        given: dict[str, Any] = {
            "model_path": config.model,
            "dtype": config.dtype,
            "page_size": page,
            "max_total_tokens": int(options.get("device_tokens", _TOKENS)),
            "max_running_requests": 16,
            "tp_size": ranks,
            **steps,
            "skip_tokenizer_init": True,
            "skip_server_warmup": True,
            "grammar_backend": "none",
            "disable_overlap_schedule": True,
            "enable_cache_report": True,
            "random_seed": 0,
            "log_level": "warning",
            **(ON_CPU if on_cpu() else {}),
            **self._cache(module, name, page, config.cache),
            **_overrides(config.model),
            **dict(options.get("engine", {})),
        }
        self._engine = Engine(**given)
        address = "\0" + os.environ[ADDRESS]
        self._control: list[Connection[Any, Any]] = [Client(f"{address}-{n}", "AF_UNIX") for n in range(ranks)]
        self._page = page
        self._salt = str(options.get("salt", self.salt))
        self._splits = Splits(page)
        self._one_shot = False
        self._number = 0

    def _cache(self, module: str, name: str, page: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = {"module_path": module, "class_name": name, "prefetch_threshold": page}
        return {
            "hicache_ratio": 2.0,
            "hicache_write_policy": "write_through",
            "hicache_storage_prefetch_policy": "wait_complete",
            "enable_hierarchical_cache": True,
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config": json.dumps({**BACKEND, **own, **settings}),
            **(HICACHE_ON_CPU if on_cpu() else {}),
        }

    def _sources(self, details: Mapping[str, Any]) -> dict[str, int]:
        """Maps SGLang's sources of cached tokens to tiers."""
        return {
            "device": int(details.get("device", 0)) + int(details.get("host", 0)),
            "disk": int(details.get("storage", 0)),
        }

    # ---------------------------------------------------------------- the suite's calls

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        """Runs all requests concurrently; recomputation is sequential."""
        if not reuse:
            return [self._recompute(request) for request in requests]
        answers = self._run(requests)
        for request, answer in zip(requests, answers, strict=True):
            self._record(request, answer)
        return answers

    def forget_splits(self) -> None:
        """Makes later recomputation one-shot."""
        self._one_shot = True

    def drop_device_cache(self) -> None:
        """Empties SGLang's own caches, on the device and on the host."""
        self._settle()
        until = time.monotonic() + _DRAIN_S
        while not self._engine.flush_cache().success:  # refused until the last request is cleaned up
            assert time.monotonic() < until, "SGLang refuses to flush its cache"
            time.sleep(0.01)

    def flush(self) -> None:
        """Blocks until everything computed is on disk."""
        self._settle()
        self._command("flush")  # false where a full disk took not everything

    def clear(self, salt: str | None = None) -> None:
        """Empties the cache under test; of all tenants with HiCache, whose page keys do not identify the tenant."""
        self._settle()
        assert all(self._command("clear", salt if self._salt == "cache_salt" else None))
        self._splits.forget(None)

    def stats(self) -> Mapping[str, float]:
        """Returns the storages' metrics, summed over ranks."""
        found: dict[str, float] = {}
        for numbers in self._command("stats"):
            for name, value in numbers.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def close(self) -> None:
        """Completes pending writes and stops the engine."""
        self._settle()
        self._command("close")
        for control in self._control:
            control.close()
        self._engine.shutdown()

    # ---------------------------------------------------------------- running

    def _command(self, command: str, value: Any = None) -> list[Any]:
        """Sends a command to every rank; returns their answers."""
        answers = []
        for control in self._control:
            control.send((command, value))
        for control in self._control:
            fine, answer = control.recv()
            assert fine, f"{command}: {answer}"
            answers.append(answer)
        return answers

    def _settle(self) -> None:
        until = time.monotonic() + _DRAIN_S
        quiet = 0
        while quiet < 2:  # twice, as work moves from queue to queue
            quiet = quiet + 1 if all(self._command("settled")) else 0
            assert time.monotonic() < until, "SGLang's cache does not become idle"
            time.sleep(0.01)

    def _run(self, requests: Sequence[Request]) -> list[Response]:
        async def together() -> list[Response]:
            return list(await asyncio.gather(*map(self._one, requests)))

        answers: list[Response] = self._engine.loop.run_until_complete(together())
        return answers

    async def _one(self, request: Request) -> Response:
        self._number += 1
        asked = GenerateReqInput(
            rid=f"r{self._number}",
            input_ids=list(request.tokens),
            sampling_params={"max_new_tokens": request.max_new_tokens, "temperature": 0.0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=-1,
            top_logprobs_num=_TOP,
            **{self._salt: request.salt or None},
            stream=bool(request.cancel_after),
        )
        manager = self._engine.tokenizer_manager
        found: dict[str, Any] = {}
        try:
            async for found in manager.generate_request(asked, None):
                if request.cancel_after and found["meta_info"]["completion_tokens"] >= request.cancel_after:
                    manager.abort_request(rid=asked.rid)
        except Exception as error:
            return Response(error=f"{type(error).__name__}: {error}")
        if request.cancel_after:
            return Response(tokens=tuple(found["output_ids"]), error="cancelled")
        meta = found["meta_info"]
        if meta["finish_reason"]["type"] not in ("length", "stop"):
            return Response(error=f"finished with {meta['finish_reason']}")
        tokens = tuple(found["output_ids"])
        cached = self._sources(meta.get("cached_tokens_details") or {})
        return Response(
            tokens=tokens,
            logprobs=tuple(_bits(row) for row in meta["output_top_logprobs"]),
            logprob=tuple(float(row[0]) for row in meta["output_token_logprobs"]),
            cached={source: count for source, count in cached.items() if count},
        )

    # ---------------------------------------------------------------- the same split again

    def _record(self, request: Request, answer: Response) -> None:
        owner, columns = (request.salt, ""), sum(answer.cached.values())
        start = self._splits.began(owner, request.tokens, columns)
        tokens = request.tokens + answer.tokens[:-1]  # the last token has no KV yet
        done = Pass(tokens, len(request.tokens), start)
        first, last = columns, len(tokens) // self._page * self._page
        with self._splits.lock:
            held = self._splits.start_of(owner, (*request.tokens, 0))
            if held.columns == len(request.tokens):  # its last page was cached and is not replaced
                self._splits.wrote(owner, done, first, held.columns - self._page)
                first = held.columns
            self._splits.wrote(owner, done, first, last)

    def _recompute(self, request: Request) -> Response:
        self.drop_device_cache()
        self._command("bypass", True)
        try:
            start = Start() if self._one_shot else self._splits.start_of((request.salt, ""), request.tokens)
            refill(start, request.tokens, request.salt, self._pass)
            return self._pass(request, start.columns)
        finally:
            self._command("cap", None)
            self.drop_device_cache()
            self._command("bypass", False)

    def _pass(self, request: Request, columns: int) -> Response:
        self._settle()  # pages that are being backed up cannot be evicted
        self._command("cap", columns)
        [answer] = self._run([request])
        if answer.error:
            return answer
        own = sum(answer.cached.values())
        if own != columns:
            return Response(error=f"replayed from token {own}, but the pass began at {columns}")
        return Response(tokens=answer.tokens, logprobs=answer.logprobs, logprob=answer.logprob)


class LinkerSession(SGLangSession):
    """One engine with the linker, whose hits SGLang reports as `host`."""

    storage = "lmcache_sglang.testing.observed:ObservedLinker"
    salt = "cache_salt"

    def _cache(self, module: str, name: str, page: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                "linker": name,
                "linker_module_path": module,
                "linker_extra_config": dict(settings),
            },
        }

    def _sources(self, details: Mapping[str, Any]) -> dict[str, int]:
        return {"device": int(details.get("device", 0)), "disk": int(details.get("host", 0))}


def _fork_instead_of_spawning() -> None:
    """Makes SGLang fork its processes, which then inherit imported modules and start half a minute faster."""
    plain = multiprocessing.set_start_method
    plain("fork", force=True)

    def keep(method: str | None, force: bool = False) -> None:
        """Ignores SGLang's request for `spawn`, which it needs for GPUs."""

    multiprocessing.set_start_method = keep


def _overrides(model: str) -> dict[str, str]:
    """Returns configuration fields of DeepSeek models that SGLang needs and newer transformers no longer write."""
    found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if found.get("model_type") != "deepseek_v2" or "moe_layer_freq" in found:
        return {}
    return {"json_model_override_args": json.dumps({"moe_layer_freq": 1, "scoring_func": "softmax"})}


def _bits(row: Sequence[Any]) -> bytes:
    """Encodes token ids and log-probs, in SGLang's order."""
    return b"".join(struct.pack("<Id", int(token), float(logprob)) for logprob, token, *_ in row)
