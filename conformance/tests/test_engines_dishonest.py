"""A correct adapter passes the engine suite; each misreporting one fails it, with a message that explains the failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


ONLY = {"WritesElsewhere": "nothing_is_written", "Sharing": "clean_miss", "Bound": "bound", "Reader": "bound"}
"""Restricts the run to the relevant tests, by `-k` expression."""


def run(name: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs the suite on the class `Dishonest<name>`."""
    words = [sys.executable, "-m", "pytest", f"dishonest.py::Dishonest{name}", "-c", os.devnull, "--rootdir", str(HERE)]
    words += ["-o", "python_classes=Dishonest*", "-o", "python_files=dishonest.py", "-p", "no:cacheprovider", "-q"]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [*words, *more], cwd=HERE, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_an_honest_adapter_passes() -> None:
    done = run("Not")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


@pytest.mark.parametrize(
    ("name", "message", "level"),
    [
        ("TooFewTokens", "19 tokens generated instead of 20, and no end token", "logits"),
        ("HitsItDoesNotHave", "which is impossible: only", "logits"),
        ("Raises", "raised KeyError: 'block 17'", "logits"),
        ("Hangs", "no answer within 1 s", "logits"),
        ("Dies", "was killed by SIGABRT", "logits"),
        ("NoLogprobs", "log-probs are claimed, but there are 0 for 20 tokens", "logits"),
        ("ClaimsARestart", "in a new process, although a prompt", "restart"),
        ("WritesElsewhere", "written outside of the disk tier's folder: cwd/answers.log", "bytes"),
        ("Bound", "the adapters declare a bound of 0", "approximate"),
        ("Reader", "on the writer's KV: wrong tokens", "approximate"),
        ("Sharing", "on another engine's KV without semantic sharing", "approximate"),
    ],
)
def test_a_dishonest_adapter_fails_with_a_message_that_explains_it(name: str, message: str, level: str) -> None:
    done = run(name, "-x", "--hypothesis-seed=7", "-k", ONLY.get(name, "test"))
    assert done.returncode == 1, done.stdout[-4000:]
    assert message in done.stdout, done.stdout[-6000:]
    assert f"level {level} · Dishonest{name}::test_" in done.stdout, "level and case are missing"
    assert "[llama-float32] · seed 7" in done.stdout, "the seed is missing"
    command = next(line for line in done.stdout.splitlines() if "-m pytest" in line and "dishonest.py::" in line)
    assert "--hypothesis-seed=7" in command
    assert f"Dishonest{name}::test_" in command
