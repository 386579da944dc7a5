"""The contract of caches with engine memory on a simulated device, whose streams run as late as possible."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from rowlab import copy_rows
from simulated import Deferred

import lmcache.transfer.rank
import lmcache_kernels.dispatch as dispatch
from lmcache.config import Config
from lmcache.engine import CacheEngine, Slots
from lmcache.keys import Chain
from lmcache.layout import PagedKV
from lmcache.spec import KVSpec
from lmcache.tiers.base import Tier
from lmcache.transfer.engine_copy import DeviceCopier, copy_engine
from lmcache_conformance.labs.kv_pool import CHUNK, KINDS, Pool, tiny_config, tiny_spec
from lmcache_conformance.suites.cache import CacheTests
from lmcache_conformance.suites.cache_machine import CacheMachineTests
from lmcache_kernels.dma import Dma
from lmcache_kernels.pipeline import Kernel, Pipeline
from lmcache_kernels.rowcopy import RowCopy

CPU = torch.device("cpu")


class Opened:
    """`open_copier` for a device with deferred streams; `copiers` counts the calls."""

    def __init__(self, kernel: Kernel = copy_rows, *, direct: bool = False) -> None:
        self.kernel = kernel
        self.direct = direct
        self.copiers = 0

    def __call__(self, device: torch.device, *, staging_bytes: int, copy_engine_bytes: int) -> DeviceCopier:
        self.copiers += 1
        streams = Deferred(random.Random(self.copiers).randrange)
        pipeline = Pipeline(
            streams,
            CPU,
            self.kernel,
            copy_engine(Dma(), CPU),
            staging=lambda nbytes: torch.full((nbytes,), 0xAA, dtype=torch.uint8),
            staging_bytes=20_000,  # small, so that its parts are reused
            dma_bytes=64,
        )
        if self.direct:
            load = pipeline.load
            pipeline.load = lambda *args, **more: load(*args, **(more | {"direct": True}))  # type: ignore[method-assign]
        return DeviceCopier(device, pipeline)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_served_by_torch", {})


class PatientEngine(CacheEngine):
    """Waits for each store: the contract's tests look up what they have just stored."""

    def _store(self, chain: Chain, kv: PagedKV, slots: Slots) -> int:
        accepted = super()._store(chain, kv, slots)
        assert self._driver.drain(10.0, "store")
        return accepted


class OnADevice:
    """Opens caches on the simulated device."""

    direct = False

    @pytest.fixture(autouse=True)
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        opened = Opened(direct=self.direct)
        monkeypatch.setattr(lmcache.transfer.rank, "open_copier", opened)
        yield
        assert not dispatch.fallbacks()

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        return PatientEngine(config, spec, tiers=tiers)


class TestThroughStaging(OnADevice, CacheTests):
    pass


class TestStraight(OnADevice, CacheTests):
    direct = True


class TestHistoriesOnADevice(OnADevice, CacheMachineTests):
    machine_examples = 20


def test_kernels_that_do_not_run_are_replaced_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(copy: RowCopy, **_: object) -> None:
        raise RuntimeError("no binary for this GPU")

    monkeypatch.setattr(lmcache.transfer.rank, "open_copier", Opened(broken))
    tokens, source, target = (
        list(range(3 * CHUNK)),
        Pool(KINDS[0], 40, torch.bfloat16, seed=1),
        Pool(KINDS[0], 40, torch.bfloat16),
    )
    slots = torch.arange(3 * CHUNK)
    with CacheEngine(tiny_config(), tiny_spec(torch.bfloat16)) as cache:
        assert cache.store(tokens, source.kv, slots) == 3 * CHUNK
        with cache.lookup(tokens) as hit:
            assert cache.retrieve(hit, target.kv, slots) == 3 * CHUNK
        assert cache.stats()["lmcache_kernel_fallbacks"] == 1
    assert target.sequence(slots) == source.sequence(slots)
    assert "no binary for this GPU" in dispatch.fallbacks()["cpu"]


def test_a_link_too_far_behind_skips_the_store_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened()
    monkeypatch.setattr(lmcache.transfer.rank, "open_copier", opened)
    source, slots = Pool(KINDS[0], 40, torch.bfloat16, seed=1), torch.arange(2 * CHUNK)
    with CacheEngine(tiny_config(), tiny_spec(torch.bfloat16)) as cache:
        monkeypatch.setattr(Pipeline, "store", lambda self, copies, shape, outs: None)
        cache.store(list(range(2 * CHUNK)), source.kv, slots)
        with cache.lookup(list(range(2 * CHUNK))) as hit:
            assert hit.tokens == 0
        assert cache.stats()['lmcache_skipped_stores_total{reason="staging"}'] == 2
        monkeypatch.undo()
        assert cache.store(list(range(2 * CHUNK)), source.kv, slots) == 2 * CHUNK
