"""The linker passes the engine suite and shares KV with vLLM and Hugging Face in both directions; plus tests of its own."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import lmcache_hf.testing.conformance
from lmcache_conformance.contract import PATIENT, Request, Response, SessionConfig
from lmcache_conformance.engines import EngineTests
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.forked import ForkedSession
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.labs.models import model_folder
from lmcache_conformance.suites.cross import CrossTests, Side
from lmcache_sglang.testing.conformance import linker

SGLANG = Side("lmcache_sglang.testing.conformance:linker")
VLLM = Side("lmcache_vllm.testing.conformance:adapter")
HF = Side("lmcache_hf.testing.conformance:adapter")
LLAMA = msgspec.structs.replace(linker.capabilities, models=("llama",))
TOKENS = tuple(random.Random(1).choices(range(3, 1000), k=100))
WHOLE = 96
HERE = Path(__file__).parent

needs_sglang = pytest.mark.skipif(linker.why_not() is not None, reason=linker.why_not() or "")


@pytest.mark.slow
class TestSGLangLinker(EngineTests):
    """Without slow tests that only concern the core; `lmcache conformance --adapter sglang-linker` runs them, too."""

    adapter = "lmcache_sglang.testing.conformance:linker"
    capabilities = LLAMA
    test_names_do_not_depend_on_the_process = None
    test_files_are_whole_and_nothing_is_written_beside_them = None
    test_another_number_of_ranks_does_not_hit = None


@pytest.mark.slow
class TestSGLangLinkerLatent(EngineBase):
    """DeepSeek-V2: one plane, one head. `lmcache conformance --adapter sglang-linker` runs the whole suite."""

    adapter = "lmcache_sglang.testing.conformance:linker"
    capabilities = msgspec.structs.replace(linker.capabilities, models=("deepseek",), dtypes=("float32",))
    test_dialogue = ValueTests.test_logits_after_a_hit_are_those_of_recomputation_in_the_same_split
    test_restart = ValueTests.test_a_new_process_goes_on_from_disk_alone
    _goes_on = ValueTests._goes_on


# No cross tests with DeepSeek: transformers caches keys and values, SGLang the latents they are computed from.


@pytest.mark.slow
class TestHFReadsSGLang(CrossTests):
    writer, reader = SGLANG, HF
    capabilities = msgspec.structs.replace(lmcache_hf.testing.conformance.adapter.capabilities, models=("llama",))


@pytest.mark.slow
class TestSGLangReadsHF(CrossTests):
    writer, reader = HF, SGLANG
    capabilities = LLAMA


@pytest.mark.slow
class TestVLLMReadsSGLang(CrossTests):
    writer, reader = SGLANG, VLLM


@pytest.mark.slow
class TestSGLangReadsVLLM(CrossTests):
    writer, reader = VLLM, SGLANG
    capabilities = LLAMA


@contextmanager
def session(
    folder: Path, *, engine: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None, **cache: Any
) -> Iterator[ForkedSession]:
    config = SessionConfig(
        model=str(model_folder("llama")),
        cache={"disk_path": str(folder), "chunk_tokens": 16, "dram_bytes": "64MiB", **PATIENT, **cache},
        options={"engine": dict(engine or {}), **(options or {})},
    )
    with ForkedSession(
        "lmcache_sglang.testing.conformance:linker", config, preload=linker.preload, environment={}
    ) as found:
        yield found


def ask(engine: ForkedSession, *prompts: tuple[int, ...], salt: str = "") -> list[Response]:
    answers = engine.generate([Request(tokens=tokens, salt=salt) for tokens in prompts or (TOKENS,)])
    assert not any(answer.error for answer in answers), [answer.error for answer in answers]
    return answers


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Response:
    """The answer of an engine with an empty cache."""
    with session(tmp_path_factory.mktemp("disk")) as engine:
        return ask(engine)[0]


@needs_sglang
@pytest.mark.slow
class TestItsOwn:
    def test_a_hit_begins_in_the_middle_of_a_chunk(self, tmp_path: Path, truth: Response) -> None:
        """The device holds one page of a shared prefix; a chunk is two pages, and another process wrote it."""
        with session(tmp_path, chunk_tokens=32) as engine:
            ask(engine)
            engine.flush()
        with session(tmp_path, chunk_tokens=32) as engine:
            ask(engine, TOKENS[:16] + TOKENS[50:70])
            [got] = ask(engine)
            assert dict(got.cached) == {"device": 16, "disk": WHOLE - 16}
            assert got.tokens == truth.tokens

    def test_requests_that_wait_their_turn_hit(self, tmp_path: Path) -> None:
        rng = random.Random(2)
        prompts = [tuple(rng.choices(range(3, 1000), k=100)) for _ in range(6)]
        with session(tmp_path) as engine:
            plain = [ask(engine, prompt)[0] for prompt in prompts]
            engine.flush()
        with session(tmp_path, engine={"max_running_requests": 1}) as engine:
            answers = ask(engine, *prompts)
            assert [a.hit for a in answers] == [WHOLE] * len(prompts)
            assert [a.tokens for a in answers] == [p.tokens for p in plain]

    def test_what_the_device_has_evicted_comes_back(self, tmp_path: Path, truth: Response) -> None:
        """With memory for a few prompts, other prompts evict pages; there is no flush."""
        rng = random.Random(2)
        with session(tmp_path, options={"device_tokens": 256}) as engine:
            ask(engine)
            for _ in range(4):
                ask(engine, tuple(rng.choices(range(3, 1000), k=100)))
            [got] = ask(engine)
            assert got.hit == WHOLE, dict(got.cached)
            assert got.tokens == truth.tokens

    def test_extra_keys_set_apart(self, tmp_path: Path) -> None:
        """The suite uses `cache_salt` for tenants; `extra_key` is SGLang's other field."""
        with session(tmp_path, options={"salt": "extra_key"}) as engine:
            for _ in range(2):
                for salt in ("a", "b"):
                    first, again = (ask(engine, salt=salt)[0] for _ in range(2))
                    assert again.tokens == first.tokens
                engine.drop_device_cache()
            assert first.hit == WHOLE
            assert ask(engine, salt="c")[0].hit == 0

    def test_one_rank_whose_load_fails_makes_all_of_them_compute(self, tmp_path: Path) -> None:
        with session(
            tmp_path, options={"tensor_parallel": 2, "path": str(HERE), "storage": "brokensglang:OneRankFails"}
        ) as engine:
            plain = ask(engine)[0]
            engine.drop_device_cache()
            for _ in range(2):
                [got] = ask(engine)
                assert got.tokens == plain.tokens
                engine.drop_device_cache()
            assert got.hit == 0

    @pytest.mark.parametrize(
        ("cache", "message"),
        [
            ({"disk_pth": "/x"}, "did you mean 'disk_path'"),
            ({"disk_path": None, "dram_bytes": 0}, "nowhere to keep KV"),
        ],
        ids=["unknown", "nowhere"],
    )
    def test_wrong_settings_are_said_once_and_sglang_serves(
        self, tmp_path: Path, truth: Response, cache: dict[str, Any], message: str
    ) -> None:
        with session(tmp_path, **cache) as engine:
            for _ in range(2):
                [got] = ask(engine)
                assert got.tokens == truth.tokens
                assert got.hit == 0
                engine.drop_device_cache()
            said = [line for line in engine.stderr().splitlines() if "cache-disabled" in line]
            assert len(said) == 1, engine.stderr()
            assert message in said[0]

    def test_from_python_as_a_user_switches_it_on(self, tmp_path: Path) -> None:
        """With `server_args`, and without a conformance session."""
        script = tmp_path / "serve.py"
        script.write_text(SERVE, encoding="utf-8")
        command = [sys.executable, str(script), str(model_folder("llama")), str(tmp_path / "disk"), *sys.path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
        assert len(lines) == 2, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        (first, computed), (again, cached) = (line.rsplit(" ", 1) for line in lines)
        assert first == again
        assert (int(computed), int(cached)) == (0, WHOLE)


SERVE = """
import sys
model, folder, *sys.path = sys.argv[1:]
from lmcache_sglang.testing.environment import enter
enter()
import os, random, time
import lmcache_sglang
from lmcache_sglang.testing.session import ON_CPU
from sglang import Engine

if __name__ == "__main__":
    engine = Engine(model_path=model, dtype="float32", page_size=16, max_total_tokens=2048, skip_tokenizer_init=True,
        skip_server_warmup=True, grammar_backend="none", disable_overlap_schedule=True, log_level="warning", **ON_CPU,
        **lmcache_sglang.server_args(interface="linker", disk_path=folder, chunk_tokens=16))
    tokens = random.Random(1).choices(range(3, 1000), k=100)
    for _ in range(2):
        answer = engine.generate(input_ids=tokens, sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True})
        print(answer["output_ids"], answer["meta_info"]["cached_tokens"], flush=True)
        while not engine.flush_cache().success:
            time.sleep(0.1)
    engine.shutdown()
    os._exit(0)
"""
