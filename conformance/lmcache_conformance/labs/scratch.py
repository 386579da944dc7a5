"""Temporary folders for tests, in memory (`/dev/shm`) where possible: the tests are about behaviour, not about disks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_scratch_folder(prefix: str) -> Path:
    """Creates a temporary folder, which the caller removes."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if os.access(memory, os.W_OK) else None))


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yields a temporary folder and removes it afterwards."""
    folder = make_scratch_folder(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
