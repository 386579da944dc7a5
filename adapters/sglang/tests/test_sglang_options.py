"""SGLang's options that affect the storage: layouts, policies, injected failures, evictions, new weights, wrong settings."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmcache_conformance.contract import PATIENT, Request, Response, SessionConfig
from lmcache_conformance.engines.forked import ForkedSession
from lmcache_conformance.labs.models import model_folder
from lmcache_sglang.testing.conformance import adapter

if why := adapter.why_not():
    pytest.skip(why, allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TOKENS = tuple(random.Random(1).choices(range(3, 1000), k=100))
WHOLE = 96


@contextmanager
def session(
    folder: Path,
    engine: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    **cache: Any,
) -> Iterator[ForkedSession]:
    config = SessionConfig(
        model=str(model_folder("llama")),
        cache={"disk_path": str(folder), **PATIENT, **cache},
        options={"engine": dict(engine or {}), **(options or {})},
    )
    found = ForkedSession(
        "lmcache_sglang.testing.conformance:adapter",
        config,
        preload=adapter.preload,
        environment=dict(environment or {}),
    )
    with found:
        yield found


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Response:
    """The answer of an engine with an empty cache."""
    with session(tmp_path_factory.mktemp("disk")) as engine:
        return ask(engine)


def ask(engine: ForkedSession, tokens: tuple[int, ...] = TOKENS) -> Response:
    [response] = engine.generate([Request(tokens=tokens)])
    assert not response.error
    return response


AS_LONG_AS_IT_TAKES = {"hicache_storage_prefetch_policy": "wait_complete"}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layer_first": ({"hicache_mem_layout": "layer_first"}, {}),
    "page_first_direct, copies": ({}, {"interface_v1": 0}),
    "layer_first, copies": ({"hicache_mem_layout": "layer_first"}, {"interface_v1": 0}),
    "write_through_selective": ({"hicache_write_policy": "write_through_selective"}, {}),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_hits_under_the_options_of_hicache(tmp_path: Path, truth: Response, what: str) -> None:
    engine_options, cache = OPTIONS[what]
    with session(tmp_path, engine_options, **cache) as engine:
        for _ in range(3):  # `write_through_selective` writes pages when they are reused
            assert ask(engine).tokens == truth.tokens
        engine.drop_device_cache()
        got = ask(engine)
        assert got.hit == WHOLE, dict(got.cached)
        assert got.tokens == truth.tokens
        engine.flush()
    with session(tmp_path) as engine:  # under another layout
        got = ask(engine)
        assert got.hit == WHOLE, dict(got.cached)
        assert got.tokens == truth.tokens


@pytest.mark.parametrize("policy", ["best_effort", "timeout"])
def test_answers_do_not_depend_on_how_long_sglang_waits(tmp_path: Path, truth: Response, policy: str) -> None:
    with session(tmp_path, {"hicache_storage_prefetch_policy": policy}) as engine:
        for _ in range(4):
            assert ask(engine).tokens == truth.tokens
            engine.drop_device_cache()


def test_failures_that_sglang_injects_cost_hits_and_nothing_else(tmp_path: Path, truth: Response) -> None:
    environment = {
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.4",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.05",
    }
    with session(tmp_path, environment=environment) as engine:
        hits = set()
        for _ in range(12):
            got = ask(engine)
            hits.add(got.hit)
            assert got.tokens == truth.tokens
            engine.drop_device_cache()
        assert hits >= {0, WHOLE}, f"hits of twelve requests were {hits}"


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_what_device_and_host_have_evicted_comes_back(tmp_path: Path, truth: Response, policy: str) -> None:
    """With memory for a few prompts, other prompts evict pages; there is no flush. `write_back` writes evicted pages."""
    rng = random.Random(2)
    options = {"hicache_ratio": 1.2, "hicache_write_policy": policy}
    with session(tmp_path, options, options={"device_tokens": 256}) as engine:
        assert ask(engine).tokens == truth.tokens
        for _ in range(8):
            ask(engine, tuple(rng.choices(range(3, 1000), k=100)))
        got = ask(engine)
        assert got.hit > 0, dict(got.cached)
        assert got.tokens == truth.tokens


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"disk_pth": "/x"}, "did you mean 'disk_path'"),
    "value": ({"disk_bytes": "lots"}, "disk_bytes"),
    "page": ({"chunk_tokens": 24}, "no multiple of SGLang's page of 16"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_are_said_once_and_sglang_serves(tmp_path: Path, truth: Response, what: str) -> None:
    cache, message = WRONG[what]
    with session(tmp_path, **cache) as engine:
        for _ in range(2):
            got = ask(engine)
            assert got.tokens == truth.tokens
            assert got.hit == 0
            engine.drop_device_cache()
        said = [line for line in engine.stderr().splitlines() if "cache-disabled" in line]
        assert len(said) == 1, engine.stderr()
        assert message in said[0]
        assert "Write page to storage" not in engine.stderr()


UPDATE = """
import os, sys
sys.path[:0] = {path!r}
from lmcache_sglang.testing.environment import enter
enter()
from lmcache_conformance.contract import Request, SessionConfig
from lmcache_sglang.testing.session import SGLangSession

def main():
    session = SGLangSession(SessionConfig(model={old!r}, cache={{"disk_path": {disk!r}}}))
    request = Request(tokens={tokens!r})
    def ask():
        [answer] = session.generate([request])
        print(answer.hit, list(answer.tokens), flush=True)
        session.drop_device_cache()
    ask(); ask()
    done = session._engine.loop.run_until_complete(update(session._engine))
    assert done[0], done
    ask(); ask()
    session.close()
    os._exit(0)

async def update(engine):
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
    return await engine.tokenizer_manager.update_weights_from_disk(UpdateWeightFromDiskReqInput(model_path={new!r}), None)

if __name__ == "__main__":
    main()
"""


def test_new_weights_under_a_running_engine_find_nothing_of_the_old(tmp_path: Path, truth: Response) -> None:
    old, new = str(model_folder("llama")), str(model_folder("llama", seed=2))
    script = tmp_path / "update.py"
    script.write_text(
        UPDATE.format(path=sys.path, old=old, new=new, disk=str(tmp_path / "disk"), tokens=TOKENS), encoding="utf-8"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280, check=False)
    lines = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lines) == 4, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    hits, answers = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert hits == ("0", str(WHOLE), "0", str(WHOLE)), lines
    assert answers[0] == answers[1] == str(list(truth.tokens))
    assert answers[2] == answers[3] != answers[0]
