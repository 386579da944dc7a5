"""Fixtures: folders in memory, since these tests check what a tier does and not how fast a disk is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm() -> Iterator[Path]:
    base = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="lmcache-test-", dir=base if base.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
