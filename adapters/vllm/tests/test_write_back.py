"""Write-backs of a real engine to a disk that fails for a while."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from lmcache_conformance.contract import Request, SessionConfig
from lmcache_conformance.engines.forked import ForkedSession
from lmcache_conformance.labs.damage import object_files
from lmcache_conformance.labs.models import model_folder, vocabulary

CHUNK = 32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def test_what_a_disk_refused_is_written_once_it_has_recovered(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    cache = {"chunk_tokens": CHUNK, "dram_bytes": "64MiB", "disk_path": str(disk)}
    config = SessionConfig(model=str(model_folder("llama")), cache=cache)
    rng = random.Random(5)
    prompts = [Request(tokens=tuple(rng.choices(vocabulary("llama"), k=6 * CHUNK + 8))) for _ in range(3)]
    with ForkedSession(
        "lmcache_vllm.testing.conformance:adapter", config, preload="lmcache_vllm.testing.preload", timeout_s=120.0
    ) as session:
        session.generate(prompts[:1])
        session.flush()
        assert len(object_files(disk)) == 6
        [objects] = [folder for folder in disk.rglob("objects") if folder.is_dir()]
        objects.rename(tmp_path / "away")
        objects.write_text("not a folder")
        session.generate(prompts[1:2])
        session.flush()
        assert session.stats()["index_written"] == 6, "the disk did not fail: the test shows nothing"
        objects.unlink()
        (tmp_path / "away").rename(objects)
        session.generate(prompts[2:])
        session.flush()
        assert len(object_files(disk)) == 3 * 6
