"""Round trips through the tiers for every host layout and device pool. In separate processes: SGLang patches transformers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("inside", ["inside_pools.py", "inside_linker.py"])
def test_pages_of_real_pools(inside: str) -> None:
    command = f"""
import sys
sys.path[:0] = {[str(HERE), *sys.path]!r}
from lmcache_sglang.testing.environment import enter
enter()
import pytest
sys.exit(pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", {str(HERE / inside)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout
