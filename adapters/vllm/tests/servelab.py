"""Runs a real `vllm serve` in its own process group: its log, its metrics, and chats through the OpenAI client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lmcache_conformance.runner.processes import kill_group

CHUNK = 256
"""The default of `chunk_tokens`, a multiple of vLLM's CPU block size of 128 tokens."""

WAIT_S = 120.0
START_S = 400.0
_SETTLE_S = 0.2

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_LOAD_TIMEOUT_S": "100",  # late loads are misses, and this machine may be busy
    "LMCACHE_PROBE_TIMEOUT_S": "100",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
}

Message = dict[str, str]


class Server:
    """One server in its own process group; ready once constructed. Use it as a context manager.

    Args:
        model: folder of the model.
        disk: folder of the disk tier.
        log: file for the server's output.
        more: further options of `vllm serve`.
    """

    def __init__(self, model: Path, disk: Path, log: Path, more: Sequence[str] = ()) -> None:
        from openai import OpenAI

        self._port = _free_port()
        self._log = log
        cache = {"dram_bytes": "256MiB", "disk_path": str(disk)}
        transfer = {
            "kv_connector": "LMCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": cache,
        }
        options = {
            "--host": "127.0.0.1",
            "--port": str(self._port),
            "--served-model-name": "model",
            "--dtype": "float32",  # hits and recomputation then give the same tokens
            "--max-model-len": "2048",
            "--max-num-seqs": "4",
            "--num-gpu-blocks-override": "48",
            "--kv-transfer-config": json.dumps(transfer),
        }
        command = [*_vllm(), "serve", str(model), "--enforce-eager", *more]
        command += [word for pair in options.items() for word in pair]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT},
            )
        self.client = OpenAI(base_url=f"{self._url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)
        try:
            self._await_health()
        except BaseException:
            self.kill9()
            raise

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _await_health(self) -> None:
        until = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self._ask("/health")
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start. Its last lines:\n{self.log()[-6000:]}")

    def _ask(self, path: str, method: str = "GET") -> str:
        request = urllib.request.Request(self._url + path, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return str(answer.read().decode())

    # ---------------------------------------------------------------- requests

    def chat(self, messages: Sequence[Message], *, stream: bool = True, salt: str = "", tokens: int = 24) -> str:
        """Returns the server's response, sampled greedily."""
        if stream:
            return "".join(self.pieces(messages, salt=salt, tokens=tokens))
        answer = self.client.chat.completions.create(**_arguments(messages, salt, tokens))
        return answer.choices[0].message.content or ""

    def pieces(self, messages: Sequence[Message], *, salt: str = "", tokens: int = 24) -> Iterator[str]:
        """Yields the server's response as it is streamed."""
        for chunk in self.client.chat.completions.create(**_arguments(messages, salt, tokens), stream=True):
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""

    def drop_own_cache(self) -> None:
        """Empties vLLM's own prefix cache, which fails while blocks are in use: until a little after the end of a request."""
        await_true(
            lambda: bool(json.loads(self._ask("/reset_prefix_cache", "POST"))["success"]), "vLLM drops its own cache"
        )

    # ---------------------------------------------------------------- metrics and log

    def metrics(self) -> Mapping[str, float]:
        """Returns `name{label="…"}` → value, without vLLM's own labels."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self._ask("/metrics")):
            for sample in family.samples:
                if sample.name.endswith(("_created", "_bucket")):
                    continue
                labels = [f'{k}="{v}"' for k, v in sorted(sample.labels.items()) if k not in ("engine", "model_name")]
                name = f"{sample.name}{{{','.join(labels)}}}" if labels else sample.name
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def settled(self) -> Mapping[str, float]:
        """Returns `metrics` once they include all past requests: vLLM publishes them a step after the response."""
        for _ in range(2):  # the engine makes a step before the second call
            self.drop_own_cache()
        found: list[Mapping[str, float]] = [{}]

        def same() -> bool:
            time.sleep(_SETTLE_S)
            found.append({k: v for k, v in self.metrics().items() if k.startswith(("lmcache_", "vllm:"))})
            return found[-1] == found[-2]

        await_true(same, "the metrics stop changing")
        return found[-1]

    def log(self) -> str:
        """Returns the server's output."""
        return self._log.read_text(errors="replace")

    # ---------------------------------------------------------------- shutdown

    def stop(self) -> int:
        """Stops the server with SIGTERM, as a service manager does; returns the exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(WAIT_S)
        finally:
            self.kill9()

    def kill9(self) -> None:
        """Kills all its processes at once."""
        kill_group(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(WAIT_S)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill9()


def _arguments(messages: Sequence[Message], salt: str, tokens: int) -> dict[str, Any]:
    extra: dict[str, Any] = {"ignore_eos": True}
    if salt:
        extra["cache_salt"] = salt
    return {"model": "model", "messages": messages, "temperature": 0.0, "max_tokens": tokens, "extra_body": extra}


def _vllm() -> list[str]:
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_true(done: Callable[[], bool], what: str) -> None:
    """Waits until `done()` is true; `what` describes it in the error."""
    until = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > until:
            raise AssertionError(f"timed out waiting until {what}")
        time.sleep(0.05)


def grown(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    """Returns how much a series has grown."""
    return after.get(name, 0.0) - before.get(name, 0.0)
