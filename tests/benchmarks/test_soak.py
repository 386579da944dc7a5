"""The short form of `benchmarks/soak.py`: engines on shared folders, killed, cleared and confused at random."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"


@pytest.mark.slow
def test_twenty_seconds_of_random_kills_clears_and_clock_jumps_lose_nothing():
    command = [sys.executable, str(SOAK), "--minutes", "0.33", "--no-hf", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    outcome = json.loads(done.stdout)
    assert outcome["ok"]
    for name in ("stored_tokens", "loaded_tokens", "true_flushes", "clears", "kills", "vouched_checked", "clock_jumps"):
        assert outcome["counts"][name], f"nothing happened: {name}"
