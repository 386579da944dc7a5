"""More prompts on disk than DRAM has room for, and prompts longer than DRAM, on a real engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from lmcache_conformance.contract import Request, SessionConfig
from lmcache_conformance.engines.forked import ForkedSession
from lmcache_conformance.labs.models import model_folder, vocabulary

CHUNK = 32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def test_all_that_is_on_disk_is_loaded_however_little_room_dram_has(tmp_path: Path) -> None:
    rng = random.Random(3)
    short = [Request(tokens=tuple(rng.choices(vocabulary("llama"), k=6 * CHUNK + 8))) for _ in range(12)]
    long = Request(tokens=tuple(rng.choices(vocabulary("llama"), k=40 * CHUNK + 8)))

    def engine(dram_bytes: str) -> ForkedSession:
        cache = {"chunk_tokens": CHUNK, "dram_bytes": dram_bytes, "disk_path": str(tmp_path / "disk")}
        options = {"engine": {"max_num_seqs": 1}, "kv_load_failure_policy": "recompute"}
        config = SessionConfig(model=str(model_folder("llama")), cache=cache, options=options)
        preload = "lmcache_vllm.testing.preload"
        return ForkedSession("lmcache_vllm.testing.conformance:adapter", config, preload=preload, timeout_s=120.0)

    with engine("64MiB") as session:
        first = [answer.tokens for answer in session.generate([*short, long])]
        session.flush()
    with engine("2MiB") as session:  # 16 chunks
        together, alone = session.generate(short), session.generate([long])
        assert [(answer.hit, answer.error) for answer in together] == [(6 * CHUNK, "")] * len(short)
        assert [(answer.hit, answer.error) for answer in alone] == [(40 * CHUNK, "")]
        assert [answer.tokens for answer in (*together, *alone)] == first
        missed = {key: value for key, value in session.stats().items() if key.startswith("lmcache_miss_tokens_total")}
        assert missed == {'lmcache_miss_tokens_total{reason="tail"}': 13 * 8}
