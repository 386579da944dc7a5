"""kill −9 during stores: after a restart only correct bytes are served, and everything that was flushed is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.timeout(600)
def test_fifty_kills_lose_nothing_flushed_and_serve_nothing_wrong(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(2), "little")
    result = subprocess.run(
        [sys.executable, SUPPORT / "crash_driver.py", tmp_path, "50", str(seed)],
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}\n{result.stderr[-4000:]}"
    assert result.stdout.startswith("50 kills")
