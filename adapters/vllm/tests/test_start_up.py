"""A problem at start-up is logged in one line and the engine runs without cache; with `strict` it does not start."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from lmcache.config import Config
from lmcache.control.outcomes import TierInfo
from lmcache.errors import LMCacheError
from lmcache.keys import Extra
from lmcache.observe.log import LOGGER
from lmcache.spec import KVSpec
from lmcache_conformance.contract import Request, SessionConfig
from lmcache_conformance.labs.engine_layouts import Lab, bits, kv_spec, mla, vllm_cpu_amx, vllm_cpu_vec, vllm_packed
from lmcache_conformance.labs.models import model_folder
from lmcache_conformance.remote.child import EngineRaised, RemoteSession
from lmcache_vllm import compat, names
from lmcache_vllm.compat import UnsupportedError
from lmcache_vllm.connector import KVConnectorRole, LMCacheConnector
from lmcache_vllm.geometry import layer_number
from lmcache_vllm.layouts import prove_layout
from lmcache_vllm.messages import Handshake, Offer, StepMeta, agreed
from lmcache_vllm.requests import last_of, resident_chunks
from lmcache_vllm.scheduler import ConnectorScheduler
from lmcache_vllm.stats import Increments
from lmcache_vllm.worker import ConnectorWorker, slots_of

Plain = SimpleNamespace
CHUNK, BLOCK = 64, 32


# ---------------------------------------------------------------- stand-ins for vLLM's objects


def kv_config(names: list[str], *, blocks: int = 6, block: int = BLOCK, spec: Any = None) -> Any:
    """A `KVCacheConfig` of one group."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = spec or FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])


def engine_config(cache: dict[str, Any] | None = None, **parallel: int) -> Any:
    """The parts of a `VllmConfig` that the connector reads."""
    sizes = {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "decode_context", "prefill_context")}
    return Plain(
        kv_transfer_config=Plain(kv_connector_extra_config=cache or {}, is_kv_consumer=True, is_kv_producer=True),
        kv_events_config=None,
        parallel_config=Plain(**{**sizes, **parallel}, rank=0),
        cache_config=Plain(calculate_kv_scales=False, cache_dtype="auto"),
        model_config=Plain(
            is_encoder_decoder=False,
            get_total_num_kv_heads=lambda: 2,
            enforce_eager=True,
            dtype=torch.float32,
            quantization=None,
            hf_config=Plain(to_dict=lambda: {"rope_parameters": {"rope_type": "default"}}),
            max_model_len=512,
        ),
        device_config=Plain(device_type="cpu"),
        compilation_config=Plain(mode="none"),
    )


class Layer:
    """An attention module whose implementation writes with `write(key, value, cache, slots)`."""

    def __init__(self, write: Callable[..., None], impl: str = "FakeImpl") -> None:
        def update(self: Any, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
            write(key, value, cache, slots)

        self.impl = type(impl, (), {"do_kv_cache_update": update})()


def write_packed(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    block = cache.shape[2]
    cache[slots // block, :, slots % block] = torch.cat([key, value], dim=-1)


def packed_caches(dim: int = 32, heads: int = 2, blocks: int = 6) -> dict[str, torch.Tensor]:
    pool = torch.randn(3, blocks, heads, BLOCK, 2 * dim)
    return {f"model.layers.{i}.self_attn": pool[i] for i in range(3)}


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("module", [None, "lmcache_vllm"])
def test_vllm_finds_the_connector_by_its_name_alone_or_by_its_module(module: str | None) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    given = KVTransferConfig(kv_connector="LMCacheConnector", kv_role="kv_both", kv_connector_module_path=module)
    assert KVConnectorFactory.get_connector_class(given) is LMCacheConnector


# ---------------------------------------------------------------- invalid settings


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns the cache's warnings so far."""
    caplog.set_level(logging.INFO, "lmcache")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "lmcache" and r.levelno >= logging.WARNING]


def connectors(config: Any) -> tuple[LMCacheConnector, LMCacheConnector]:
    """Returns (worker, scheduler) connectors, created as vLLM creates them, after their handshake."""
    caches = kv_config(["model.layers.0.self_attn"])
    worker = LMCacheConnector(config, KVConnectorRole.WORKER, caches)
    scheduler = LMCacheConnector(config, KVConnectorRole.SCHEDULER, caches)
    offer = worker.get_handshake_metadata()
    if offer is not None:
        scheduler.set_xfer_handshake_metadata({0: offer})
    return worker, scheduler


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "worker_rank", lambda: (0, 1))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown setting": (
        {"dram_byte": "1MiB"},
        "unknown setting in engine JSON: 'dram_byte'; did you mean 'dram_bytes'",
    ),
    "a size in no unit": (
        {"dram_bytes": "4G"},
        "dram_bytes (from engine JSON): '4G' has an unknown unit; write 4GB or 4GiB",
    ),
    "more memory than there is": ({"dram_bytes": "900TiB"}, "dram_bytes (from engine JSON): 900TiB is beyond the"),
    "a file in the place of the folder": ({"disk_path": __file__}, "is a file; give a folder"),
    "a wrong word": ({"policy": "mru"}, "policy (from engine JSON): 'mru' is not one of 'lru', 'lfu', 's3fifo'"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("what", BAD)
def test_a_setting_that_cannot_be_right_is_said_once_and_the_engine_goes_on_uncached(
    what: str, warnings: Callable[[], list[str]]
) -> None:
    cache, message = BAD[what]
    made = connectors(engine_config(cache))
    [line] = warnings()
    assert line.startswith("cache-disabled reason=")
    assert message in line
    for connector in made:
        assert_passive(connector)
    assert warnings() == [line]


def assert_passive(connector: LMCacheConnector) -> None:
    """Checks that the connector answers every call of vLLM and requests nothing."""
    request = Plain(request_id="1", num_tokens=512)
    blocks = Plain(get_block_ids=lambda: ([1, 2],))
    connector.register_kv_caches({})
    connector.on_new_request(request)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    connector.update_state_after_alloc(request, blocks, 0)
    meta = connector.build_connector_meta(Plain(num_scheduled_tokens={"1": 512}, total_num_scheduled_tokens=512))
    assert meta.plan.jobs == ()
    connector.bind_connector_metadata(meta)
    connector.start_load_kv(Plain())
    connector.wait_for_save()
    results = connector.get_transfer_results(set())
    assert not results.finished_recving
    assert not results.failed_recving
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.build_connector_worker_meta() is None
    assert connector.request_finished(request, [1, 2]) == (False, None)
    assert connector.has_pending_push_work() is False
    assert connector.get_kv_connector_stats() is None
    connector.shutdown()


@pytest.mark.parametrize("what", BAD)
def test_a_setting_that_cannot_be_right_ends_a_strict_engine_with_that_message(what: str) -> None:
    cache, message = BAD[what]
    with pytest.raises(LMCacheError) as raised:
        connectors(engine_config({**cache, "strict": True}))
    assert message in str(raised.value)


UNSUPPORTED = {
    "pipeline_parallel_size": "pipeline parallelism is not supported yet",
    "decode_context_parallel_size": "context parallelism (decode_context_parallel_size)",
    "prefill_context_parallel_size": "context parallelism (prefill_context_parallel_size)",
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("option", UNSUPPORTED)
def test_an_unsupported_option_is_named_and_the_engine_goes_on_uncached(
    option: str, warnings: Callable[[], list[str]]
) -> None:
    made = connectors(engine_config(**{option: 2}))
    [line] = warnings()
    assert line.startswith("cache-disabled")
    assert UNSUPPORTED[option] in line
    for connector in made:
        assert_passive(connector)


@pytest.mark.usefixtures("one_rank")
def test_stages_of_a_pipeline_shake_hands_and_go_on_uncached() -> None:
    caches = kv_config(["model.layers.0.self_attn"])
    config = engine_config(pipeline_parallel_size=2)
    offer = LMCacheConnector(config, KVConnectorRole.WORKER, caches).get_handshake_metadata()
    scheduler = LMCacheConnector(config, KVConnectorRole.SCHEDULER, caches)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): offer, (1, 0): offer})
    assert_passive(scheduler)


@pytest.mark.usefixtures("one_rank")
def test_a_model_without_kv_goes_on_uncached(warnings: Callable[[], list[str]]) -> None:
    empty = kv_config([])
    empty.kv_cache_groups.clear()
    for role in (KVConnectorRole.WORKER, KVConnectorRole.SCHEDULER):
        assert_passive(LMCacheConnector(engine_config(), role, empty))
    assert warnings() == ['cache-disabled reason="this model keeps no KV"']


def test_strictness_may_be_asked_for_from_outside_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_STRICT", "1")
    with pytest.raises(UnsupportedError, match="pipeline parallelism"):
        connectors(engine_config(pipeline_parallel_size=2))


def test_other_unsupported_engines_are_named() -> None:
    scales, two_towers = engine_config(), engine_config()
    scales.cache_config.calculate_kv_scales = True
    two_towers.model_config.is_encoder_decoder = True
    with pytest.raises(UnsupportedError, match="calculate_kv_scales"):
        compat.check_config(scales)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        compat.check_config(two_towers)
    compat.check_config(engine_config())


@pytest.mark.usefixtures("one_rank")
def test_an_old_vllm_is_refused_and_an_untested_one_warned_of(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(compat, "TESTED", ("0.30", "0.32"))
    monkeypatch.setattr(compat.vllm, "__version__", "0.27.1+cpu")
    connectors(engine_config())
    assert warnings() == ['cache-disabled reason="vLLM 0.27.1+cpu is too old; the connector needs 0.28 or newer"']
    monkeypatch.setattr(compat.vllm, "__version__", "0.99.0")
    assert "vLLM 0.99.0 was never tested with this connector, only 0.30, 0.32;" in compat.check_version()
    monkeypatch.setattr(compat.vllm, "__version__", "0.32.5+cu129")
    assert compat.check_version() == ""


@pytest.mark.usefixtures("one_rank")
def test_a_vllm_with_other_internals_is_no_reason_to_crash(warnings: Callable[[], list[str]]) -> None:
    config = engine_config()
    del config.parallel_config.pipeline_parallel_size
    for connector in connectors(config):
        assert_passive(connector)
    [line] = warnings()
    assert "AttributeError" in line


@pytest.mark.usefixtures("one_rank")
def test_a_worker_that_fails_alone_tells_the_scheduler_why(warnings: Callable[[], list[str]]) -> None:
    caches = kv_config(["model.layers.0.self_attn"])
    worker = LMCacheConnector(engine_config({"dram_bytes": "4G"}), KVConnectorRole.WORKER, caches)
    assert warnings() == []
    scheduler = LMCacheConnector(engine_config(), KVConnectorRole.SCHEDULER, caches)
    scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})
    [line] = warnings()
    assert line.startswith('cache-disabled reason="rank 0: dram_bytes (from engine JSON)')
    assert scheduler.get_num_new_matched_tokens(Plain(request_id="1"), 0) == (0, False)


def test_a_half_that_raises_and_cannot_start_anew_is_switched_off_and_says_so_once(
    warnings: Callable[[], list[str]],
) -> None:
    scheduler = LMCacheConnector(engine_config(), KVConnectorRole.SCHEDULER, kv_config(["model.layers.0.self_attn"]))
    assert scheduler._scheduler is not None
    metrics = scheduler._scheduler.metrics
    scheduler._scheduler._opening = 0
    scheduler._scheduler._plane = Plain()  # type: ignore[assignment]  # every access to it raises
    for _ in range(3):
        assert scheduler.get_num_new_matched_tokens(request(tokens=[1, 2, 3]), 0) == (0, False)
    lines = warnings()
    assert [line.split()[0] for line in lines] == ["request-uncached", "cache-restart", "cache-off"]
    assert all("AttributeError" in line for line in lines)
    assert metrics.snapshot()['lmcache_failures_total{op="connector",reason="internal"}'] == len(lines)


# ---------------------------------------------------------------- workers that cannot cache


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> Callable[..., tuple[ConnectorWorker, Offer]]:
    """Opens a worker on fake layers."""

    def opened(write: Callable[..., None] = write_packed, impl: str = "FakeImpl", **cache: Any) -> Any:
        caches = packed_caches()
        layers = {name: Layer(write, impl) for name in caches}
        monkeypatch.setattr(compat, "attention_layers", lambda config: layers)
        settings = {"dram_bytes": "4MiB", "model_identity": "m", "chunk_tokens": CHUNK, **cache}
        connector_worker = ConnectorWorker(engine_config(), kv_config(list(caches)), Config(**settings))
        connector_worker.register_kv_caches(caches)
        return connector_worker, Handshake.of(connector_worker.offer()).read()

    return opened


def scheduler_of(*offers: Offer) -> ConnectorScheduler:
    scheduler = ConnectorScheduler(kv_config(["model.layers.0.self_attn"]), Config(chunk_tokens=CHUNK))
    scheduler.open(offers)
    return scheduler


def test_a_worker_with_everything_right_offers_what_it_holds(
    worker: Callable[..., Any], warnings: Callable[[], list[str]], tmp_path: Path
) -> None:
    connector_worker, offer = worker(disk_path=str(tmp_path / "kv"))
    assert offer.disabled == ""
    assert [tier[:2] for tier in offer.tiers] == [("disk", True)]
    assert offer.slots == (4 * 2**20 // (3 * 2 * 2 * 32 * 4 * CHUNK),)
    assert scheduler_of(offer).disabled == ""
    assert warnings() == []
    connector_worker.shutdown()


def lying(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes the heads in reverse order."""
    write_packed(key.flip(1), value, cache, slots)


def silent(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes nothing."""


def failing(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    raise RuntimeError("no kernel for this")


@pytest.mark.parametrize(
    ("write", "impl", "message"),
    [
        (
            lying,
            "FakeImpl",
            "rank 0: no known layout is what vLLM writes here. packed: group 'full0': plane 'k', layer 0",
        ),
        (silent, "FakeImpl", "rank 0: no known layout is what vLLM writes here."),
        (failing, "FakeImpl", "RuntimeError: no kernel for this"),
        (write_packed, "CPUMLAImpl", "CPUMLAImpl: vLLM's reference MLA for CPUs ignores what was computed before"),
    ],
)
def test_a_backend_that_is_not_understood_disables_the_cache_with_one_line(
    write: Callable[..., None], impl: str, message: str, worker: Callable[..., Any], warnings: Callable[[], list[str]]
) -> None:
    connector_worker, offer = worker(write, impl)
    assert connector_worker.metrics.snapshot()['lmcache_failures_total{op="open",reason="unsupported"}'] == 1
    scheduler = scheduler_of(offer)
    [line] = warnings()
    assert line.startswith("cache-disabled")
    assert message in line
    assert scheduler.get_num_new_matched_tokens(request(tokens=list(range(512))), 0) == 0
    assert not scheduler.has_pending_push_work
    connector_worker.bind_connector_metadata(
        StepMeta(scheduler.build_connector_meta(Plain(num_scheduled_tokens={}, total_num_scheduled_tokens=0)).plan)
    )
    connector_worker.start_load_kv()
    connector_worker.wait_for_save()
    assert not connector_worker.get_transfer_results().requests
    with pytest.raises(RuntimeError, match="LMCache cannot cache here, and strict is set"):
        worker(write, impl, strict=True)


def test_a_folder_that_cannot_be_opened_leaves_a_cache_in_memory(
    worker: Callable[..., Any], warnings: Callable[[], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = str(tmp_path / "file" / "kv")
    connector_worker, offer = worker(disk_path=folder)
    [line] = warnings()
    assert line.startswith("tier-disabled tier=disk reason=")
    assert folder in line
    assert offer.disabled == ""
    assert offer.tiers == ()
    assert offer.slots[0] > 0
    connector_worker.shutdown()
    with pytest.raises(RuntimeError, match="strict is set"):
        worker(disk_path=folder, strict=True)


# ---------------------------------------------------------------- sleep


def test_a_worker_that_sleeps_touches_no_kv_and_proves_its_layout_anew(
    worker: Callable[..., Any], warnings: Callable[[], list[str]]
) -> None:
    arrange = [write_packed]  # how vLLM arranges KV; another way after waking up
    connector_worker, _ = worker(lambda *args: arrange[0](*args))
    for tags in (("weights", "kv_cache"), ("kv_cache",)):
        connector_worker.before_sleep(tags)
        assert connector_worker._kv is None
        for tag in tags:
            connector_worker.after_wake_up([tag])
        assert connector_worker._kv is not None
    connector_worker.before_sleep(("kv_cache",))
    arrange[0] = lying
    with pytest.raises(UnsupportedError, match="no known layout"):  # the connector then switches the worker off
        connector_worker.after_wake_up(None)
    assert connector_worker._kv is None
    connector_worker.shutdown()
    assert warnings() == []


# ---------------------------------------------------------------- layouts are proven


def proven(lab: Lab, layers: dict[str, Any], caches: dict[str, torch.Tensor], blocks: int) -> str:
    config = kv_config(list(caches), blocks=blocks, block=lab.block_tokens or 1)
    before = {name: cache.clone() for name, cache in caches.items()}
    try:
        kv, label = prove_layout(lab.spec, config, caches, layers)
        kv.bind(lab.spec)
    finally:
        assert all(torch.equal(bits(caches[name]), bits(before[name])) for name in caches), "scratch was not restored"
    return label


def lab_caches(lab: Lab, shape: tuple[int, ...] | None = None) -> dict[str, torch.Tensor]:
    lab.randomize(1)
    return {f"layers.{i}.attn": tensor.view(shape) if shape else tensor for i, tensor in enumerate(lab.tensors)}


def lab_layers(lab: Lab, *, lie: bool = False) -> dict[str, Any]:
    """Returns layers that write with the lab's own arithmetic; with `lie`, they swap K and V of every second token."""

    def writer(number: int) -> Callable[..., None]:
        k, v = lab.spec.groups[0].planes

        def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
            if lie:
                odd = (slots % 2 == 1)[:, None, None]
                key, value = torch.where(odd, value, key), torch.where(odd, key, value)
            lab.write(k, number, slots, key)
            lab.write(v, number, slots, value)

        return write

    return {f"layers.{i}.attn": Layer(writer(i)) for i in range(len(lab.tensors))}


ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
LAYOUTS: dict[str, tuple[Callable[[], Lab], str, tuple[int, ...] | None]] = {
    **{f"packed {o}": (lambda o=o: vllm_packed(o), "packed", None) for o in ORDERS},  # type: ignore[misc]
    "vec": (vllm_cpu_vec, "vec", (6, 2, 4, 16)),
    "amx": (vllm_cpu_amx, "amx", (4, 2, 32, 64)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_proven_by_its_own_write_path_and_no_other(name: str) -> None:
    make, label, shape = LAYOUTS[name]
    lab = make()
    caches = lab_caches(lab, shape)
    blocks = next(iter(caches.values())).shape[0]
    assert proven(lab, lab_layers(lab), caches, blocks) == label
    with pytest.raises(
        UnsupportedError, match=r"no known layout is what vLLM writes here\. packed: group 'full': plane 'k'"
    ):
        proven(lab, lab_layers(lab, lie=True), caches, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_this_processors_own_kernel_writes_is_proven(dtype: torch.dtype) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    isa = _get_attn_isa(dtype, BLOCK, 32)
    impl: Any = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    layer = Plain(impl=impl, isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    pool = torch.randn(3, 6, 2, BLOCK, 64).to(dtype)
    caches = {f"layers.{i}.attn": pool[i] for i in range(3)}
    lab = Lab("", "", BLOCK, kv_spec(dtype, dim=32), list(pool), vllm_cpu_vec().locate, 6 * BLOCK)
    assert proven(lab, dict.fromkeys(caches, layer), caches, 6) == ("amx" if isa == "amx" else "vec")


class LatentLayer:
    def __init__(self, cache: torch.Tensor, *, lie: bool = False) -> None:
        self.kv_cache, self.kv_cache_dtype = cache, "auto"
        self.impl = Plain(kv_lora_rank=16, do_kv_cache_update=self._liar if lie else self._update)

    def _update(
        self, latent: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *_: Any
    ) -> None:
        block = cache.shape[1]
        cache[slots // block, slots % block] = torch.cat([latent, rope.squeeze(1)], dim=-1)

    def _liar(
        self, latent: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *_: Any
    ) -> None:
        self._update(latent.flip(-1), rope, cache, slots)


def test_latents_are_proven_and_a_lie_is_told_with_the_nearest_contradiction() -> None:
    lab = mla("block slot latent")
    caches = lab_caches(lab)
    true = {name: LatentLayer(cache) for name, cache in caches.items()}
    assert proven(lab, true, caches, 7) == "latent"
    false = {name: LatentLayer(cache, lie=name == "layers.2.attn") for name, cache in caches.items()}
    with pytest.raises(
        UnsupportedError, match=r"latent: group 'full': plane 'latent', layer 2, token 0, head 0, element 0"
    ):
        proven(lab, false, caches, 7)


def test_caches_of_another_shape_or_too_few_blocks_are_refused() -> None:
    lab = vllm_packed("LBHNC")
    caches = lab_caches(lab)
    with pytest.raises(UnsupportedError, match="2 KV blocks leave no room"):
        proven(lab, lab_layers(lab), caches, 2)
    with pytest.raises(UnsupportedError, match=r"a KV tensor has the shape \(7, 2, 4, 16\), expected \(14 blocks"):
        proven(lab, lab_layers(lab), caches, 14)


# ---------------------------------------------------------------- small parts


def test_slots_follow_the_block_table_and_leave_out_what_is_not_there() -> None:
    assert slots_of([3, 1], 4, 6, 0).tolist() == [12, 13, 14, 15, 4, 5]
    assert slots_of([3, 1], 4, 6, 5).tolist() == [-1] * 5 + [5]  # `skip`: already resident
    assert slots_of([0, 1], 4, 8, 0).tolist() == [-1] * 4 + [4, 5, 6, 7]  # vLLM's null block
    assert slots_of([3], 4, 6, 0).tolist() == [12, 13, 14, 15, -1, -1]  # not allocated yet
    assert slots_of([], 4, 2, 0).tolist() == [-1, -1]
    assert slots_of([2], 4, 4, 0).dtype == torch.int64


def test_a_chunk_is_resident_where_all_its_blocks_are() -> None:
    assert resident_chunks([1, 2, 3, 4], 16, 32, 2) == [True, True]
    assert resident_chunks([0, 2, 3, 4], 16, 32, 2) == [False, True]  # before a sliding window
    assert resident_chunks([1, 2, 3], 16, 32, 2) == [True, False]
    assert resident_chunks([], 16, 32, 1) == [False]
    assert resident_chunks([7], 32, 32, 1) == [True]


def test_the_last_tokens_of_a_hit_come_from_its_farthest_tiers() -> None:
    tiers = {"dram": 256, "disk": 512}
    assert last_of(tiers, 768) == {"disk": 512, "dram": 256}
    assert last_of(tiers, 600) == {"disk": 512, "dram": 88}
    assert last_of(tiers, 100) == {"disk": 100}
    assert last_of(tiers, 0) == {}
    assert last_of({}, 10) == {"dram": 10}  # promoted since the lookup


def test_a_layers_number_is_read_from_its_name_or_refused() -> None:
    assert layer_number("model.layers.17.self_attn.attn") == 17
    assert layer_number("3.attn") == 3
    for name in ("model.layers.1.mixers.2.attn", "encoder.attn", "model.layer17.attn"):
        with pytest.raises(UnsupportedError, match="has no single number in its name"):
            layer_number(name)


def test_ranks_work_together_only_if_they_hold_the_same_model_in_the_same_way() -> None:
    spec = KVSpec.uniform("m", layers=2, kv_heads=2, head_dim=8, dtype="float32")
    first, second = (
        Offer(rank, spec.shard(tp_rank=rank, tp_size=2), (4,), (TierInfo("disk", True),)) for rank in (0, 1)
    )
    assert agreed([first, second]) == ""
    assert agreed([first, Offer(1, None, disabled="no room")]) == "rank 1: no room"
    other = KVSpec.uniform("n", layers=2, kv_heads=2, head_dim=8, dtype="float32")
    different = "ranks 0 and 1 see different models, numerics or tiers"
    assert agreed([first, Offer(1, other, (4,), (TierInfo("disk", True),))]) == different
    assert agreed([first, Offer(1, second.spec, (4,), ())]) == different


def request(tokens: list[int] | None = None, **changes: Any) -> Any:
    """The parts of a vLLM request that the connector reads."""
    tokens = [1, 2, 3] if tokens is None else tokens
    plain = {
        "request_id": "1",
        "cache_salt": None,
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "skip_reading_prefix_cache": False,
        "num_tokens": len(tokens),
        "all_token_ids": tokens,
    }
    return Plain(**{**plain, **changes})


def feature(content: float | None, offset: int = 5, modality: str = "image", **more: Any) -> Any:
    data = (
        None if content is None else {"pixels": Plain(data=torch.full((2, 3), content)), "grid": Plain(data=[2, "a"])}
    )
    plain = {"identifier": "photo-1", "data": data, "modality": modality, "mm_position": Plain(offset=offset, length=7)}
    return Plain(**{**plain, **more})


def test_content_behind_placeholders_is_named_by_kind_processed_bytes_and_place() -> None:
    [extra] = names.extras_of(request(mm_features=[feature(0.5)]))
    assert extra == Extra(5, 7, extra.digest)
    assert len(extra.digest) == 32
    assert names.extras_of(request(mm_features=[feature(0.5, identifier="photo-2")])) == (extra,)
    others = [
        feature(0.25),
        feature(0.5, modality="audio"),
        feature(0.5, offset=6),
        feature(0.5, data={"pixels": Plain(data=torch.full((3, 2), 0.5)), "grid": Plain(data=[2, "a"])}),
        feature(0.5, data={"pixels": Plain(data=torch.full((2, 3), 0.5)), "grid": Plain(data=[[2], "a"])}),
        feature(0.5, mm_position=Plain(offset=5, length=7, is_embed=torch.ones(7, dtype=torch.bool))),
    ]
    assert len({extra, *(names.extras_of(request(mm_features=[f]))[0] for f in others)}) == 1 + len(others)
    assert names.extras_of(request()) == ()


def test_content_that_nobody_can_name_is_not_cached() -> None:
    """A client's own id, a counter, and an address in shared memory say nothing about an image."""
    for unseen in (
        feature(None),
        feature(None, identifier="renderer0-mm-7"),
        feature(0, data={"address": Plain(data=1)}),
    ):
        with pytest.raises(names.Unnamed, match="need not be a hash of its content") as unnamed:
            names.extras_of(request(mm_features=[unseen]))
        assert unnamed.value.reason == "multimodal"
    with pytest.raises(names.Unnamed, match="prompt embeddings") as unnamed:
        names.extras_of(request(prompt_embeds=torch.zeros(3, 8)))
    assert unnamed.value.reason == "prompt_embeds"


def lora_folder(folder: Path, content: bytes = b"weights", alpha: int = 8) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.bin").write_bytes(content * 64)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    return str(folder)


def with_lora(path: str, number: int = 1, name: str = "a") -> Any:
    return request(lora_request=Plain(lora_path=path, lora_int_id=number, lora_name=name))


def test_two_loras_that_differ_in_their_scaling_have_two_names(tmp_path: Path) -> None:
    weak, strong = (names.lora_of(with_lora(lora_folder(tmp_path / str(alpha), alpha=alpha))) for alpha in (8, 64))
    assert weak != strong


def test_a_lora_that_changes_after_it_was_loaded_runs_uncached(tmp_path: Path) -> None:
    loras, path = names.Loras(), lora_folder(tmp_path / "a")
    first = loras.name_of(with_lora(path))
    assert loras.name_of(with_lora(path)) == first
    lora_folder(tmp_path / "a", content=b"WEIGHTS")  # what vLLM has in memory is still the old one
    for _ in range(2):
        with pytest.raises(names.Unnamed, match="changed after it was first used"):
            loras.name_of(with_lora(path))
    for again in (with_lora(path, number=2), with_lora(path, number=2, name="b")):  # vLLM's own blocks may be old
        with pytest.raises(names.Unnamed, match="changed after it was first used"):
            loras.name_of(again)
    other = lora_folder(tmp_path / "b", content=b"other")
    with pytest.raises(names.Unnamed, match="changed after it was first used"):
        loras.name_of(with_lora(other, number=3))  # the name of the first, in another folder
    assert loras.name_of(with_lora(other, number=4, name="c")) != first


def test_a_lora_that_is_gone_runs_uncached(tmp_path: Path) -> None:
    for path in ("~no-such-user/a", str(tmp_path / "gone"), "s3://bucket/lora"):
        with pytest.raises(names.Unnamed, match="cannot be named"):
            names.lora_of(with_lora(path))


def test_a_lora_is_named_by_its_weights_not_by_its_path(tmp_path: Path) -> None:
    def lora(path: str) -> Any:
        return request(lora_request=Plain(lora_path=path))

    found = []
    for name, content in (("a", b"weights" * 64), ("b", b"weights" * 64), ("c", b"WEIGHTS" * 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.bin").write_bytes(content)
        found.append(names.lora_of(lora(str(tmp_path / name))))
    assert found[0] == found[1] != found[2]
    assert names.lora_of(request()) == ""
    (tmp_path / "empty").mkdir()
    for path, why in ((str(tmp_path / "empty"), "no weights in"), ("", "it has no path")):
        with pytest.raises(names.Unnamed, match=why) as unnamed:
            names.lora_of(lora(path))
        assert unnamed.value.reason == "lora"


def test_what_was_counted_is_told_now_and_then_and_all_of_it_when_the_engine_falls_quiet() -> None:
    scheduler = ConnectorScheduler(kv_config(["model.layers.0.self_attn"]), Config())
    increments = Increments(scheduler.metrics)
    scheduler.metrics.requested(5)
    first = increments.stats()
    assert first is not None
    assert first.data == {"lmcache_requested_tokens_total": 5}
    scheduler.metrics.hit("disk", 3)
    increments._due = float("inf")
    assert increments.stats() is None
    last = increments.stats(quiet=True)
    assert last is not None
    assert last.data == {"lmcache_hit_tokens_total|disk": 3}
    assert increments.stats(quiet=True) is None


@contextmanager
def bare_logs() -> Iterator[logging.Handler]:
    """Logging as it is when only vLLM has configured it; yields vLLM's handler."""
    handler = logging.NullHandler()
    root, theirs = logging.getLogger(), logging.getLogger("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for logger, handlers in ((root, []), (theirs, [handler]), (LOGGER, [])):
            patch.setattr(logger, "handlers", handlers)
            patch.setattr(logger, "propagate", logger is LOGGER)
        theirs_level, our_level = theirs.level, LOGGER.level
        theirs.setLevel(logging.INFO)
        LOGGER.setLevel(logging.NOTSET)
        try:
            yield handler
        finally:
            theirs.setLevel(theirs_level)
            LOGGER.setLevel(our_level)


def test_the_caches_lines_go_where_vllms_go() -> None:
    with bare_logs() as handler:
        for _ in range(2):
            compat.join_log()
            assert LOGGER.handlers == [handler]
            assert LOGGER.isEnabledFor(logging.INFO)
            assert not LOGGER.isEnabledFor(logging.DEBUG)
            assert not LOGGER.propagate


def test_the_caches_lines_stay_where_the_application_sends_them() -> None:
    with bare_logs():
        own = logging.NullHandler()
        LOGGER.addHandler(own)
        compat.join_log()
        assert LOGGER.handlers == [own]


def test_a_vllm_that_is_to_be_quiet_does_not_swallow_warnings() -> None:
    with bare_logs():
        logging.getLogger("vllm").setLevel(logging.ERROR)
        compat.join_log()
        assert LOGGER.handlers == []
        assert LOGGER.isEnabledFor(logging.WARNING)


# ---------------------------------------------------------------- real engines


def session(**cache: Any) -> SessionConfig:
    return SessionConfig(model=str(model_folder("llama")), cache={"chunk_tokens": CHUNK, **cache})


def test_a_real_engine_with_an_unknown_setting_answers_right_and_uncached() -> None:
    prompt = Request(tokens=tuple(range(3, 303)))
    with RemoteSession("vllm", session(dram_bytse="8MiB")) as engine:
        first = engine.generate([prompt])
        engine.drop_device_cache()
        again = engine.generate([prompt])
        assert [r.error for r in first + again] == ["", ""]
        assert first[0].tokens == again[0].tokens
        assert first[0].logprobs == again[0].logprobs
        assert again[0].hit == 0
        lines = [line for line in engine.stderr().splitlines() if "cache-" in line]
    [line] = lines
    assert "cache-disabled" in line
    assert "did you mean 'dram_bytes'?" in line


def test_a_real_engine_that_shall_be_strict_does_not_start_with_an_unknown_setting() -> None:
    with pytest.raises(EngineRaised) as raised:
        RemoteSession("vllm", session(dram_bytse="8MiB", strict=True))
    assert raised.value.error == "ConfigError"
    assert "unknown setting in engine JSON: 'dram_bytse'; did you mean 'dram_bytes'?" in str(raised.value)
