from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test needs the hub
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if possible: these tests are not about durability."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    made = Path(tempfile.mkdtemp(prefix="lmcache-hf-", dir=base))
    yield made
    shutil.rmtree(made, ignore_errors=True)
