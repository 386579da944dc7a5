"""Plugin that vLLM calls at start-up in each of its processes (entry point group `vllm.general_plugins`).

It registers the connector's name, and adds a step to the end of `VllmConfig.__post_init__`: a configuration that cannot be cached
loses its connector, with one line that says why. vLLM would stop on some of them with any connector (encoder-decoder models).

The connector itself calls `watch_engine` and `watch_worker`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.engine.core import EngineCore

    from lmcache_vllm.connector import LMCacheConnector

NAME = "LMCacheConnector"


def register() -> None:
    """Registers the connector under its short name, and the check of configurations. May be called more than once per process."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "lmcache_vllm.connector", NAME)
    _wrap(VllmConfig, "__post_init__", _checked)


def _checked(resolve: Any) -> Any:
    def resolve_and_check(config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        wanted = _caches_prefixes(config)
        resolve(config, *args, **kwargs)
        transfer = config.kv_transfer_config
        if transfer is not None and config.model_config is not None:
            _check(config, transfer, forced_off=wanted and not _caches_prefixes(config))

    return resolve_and_check


def _caches_prefixes(config: VllmConfig) -> bool:
    return bool(getattr(getattr(config, "cache_config", None), "enable_prefix_caching", False))


def _check(config: VllmConfig, transfer: KVTransferConfig, *, forced_off: bool) -> None:
    """Removes this connector from a configuration that cannot be cached.

    Raises:
        UnsupportedError: it cannot be cached, and `strict` is set.
    """
    from lmcache_vllm import compat

    if forced_off:
        compat.mark_forced_off(config)
    if not _is_ours(transfer):
        return
    try:
        compat.check_config(config)
    except compat.UnsupportedError as error:
        if _is_strict(transfer.kv_connector_extra_config):
            raise
        from lmcache.observe.log import warning

        config.kv_transfer_config = None
        compat.join_log()
        warning("cache-disabled", reason=error)
    except Exception:
        return  # vLLM's internals have changed; the connector will say so


def _is_ours(transfer: KVTransferConfig) -> bool:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        from lmcache_vllm.connector import LMCacheConnector

        return issubclass(KVConnectorFactory.get_connector_class(transfer), LMCacheConnector)
    except Exception:  # a connector that does not exist: vLLM refuses it
        return False


def _is_strict(extra: dict[str, Any]) -> bool:
    """Whether `strict` is set, even if other settings are invalid."""
    from lmcache.config import Config

    try:
        return Config.load(json=dict(extra)).strict
    except Exception:
        return extra.get("strict") is True


def watch_engine() -> None:
    """Tells connectors in the scheduler's process what vLLM's interface does not: which adapters are loaded ahead of their
    first request (their files may be replaced between the two), and that weights change.
    """
    from vllm.v1.engine.core import EngineCore

    def add_lora(load: Any) -> Any:
        def watched(core: EngineCore, lora_request: Any) -> bool:
            known = [loras for each in _ours(_connector_of(core)) if (loras := each.loras) is not None]
            for loras in known:
                loras.loading(lora_request)
            result = load(core, lora_request)
            for loras in known:
                loras.loaded(lora_request)
            return bool(result)

        return watched

    def collective_rpc(call: Any) -> Any:
        def watched(core: EngineCore, method: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return call(core, method, *args, **kwargs)
            finally:
                if isinstance(method, str) and "weight" in method and method not in _KEEP_WEIGHTS:
                    for each in _ours(_connector_of(core)):
                        each.reset_cache()

        return watched

    _wrap(EngineCore, "add_lora", add_lora)
    _wrap(EngineCore, "collective_rpc", collective_rpc)


_KEEP_WEIGHTS = ("init_weight_transfer_engine", "shutdown_weight_transfer_engine", "compute_weight_checksums")
"""Calls of workers about weights that do not change them."""


def watch_worker(config: VllmConfig) -> None:
    """Tells connectors in a worker's process when the memory of its KV goes away and comes back."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
    from vllm.utils.import_utils import resolve_obj_by_qualname

    def connectors() -> list[LMCacheConnector]:
        return _ours(get_kv_transfer_group() if has_kv_transfer_group() else None)

    def sleep(call: Any) -> Any:
        def watched(worker: Any, *args: Any, **kwargs: Any) -> Any:
            for each in connectors():
                each.before_sleep(("weights", "kv_cache"))
            return call(worker, *args, **kwargs)

        return watched

    def discard(call: Any) -> Any:
        def watched(worker: Any, tags: Sequence[str]) -> Any:
            for each in connectors():
                each.before_sleep(tags)
            return call(worker, tags)

        return watched

    def wake_up(call: Any) -> Any:
        def watched(worker: Any, tags: Sequence[str] | None = None) -> Any:
            result = call(worker, tags)
            for each in connectors():
                each.after_wake_up(tags)
            return result

        return watched

    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    for name, around in (("sleep", sleep), ("discard", discard), ("wake_up", wake_up)):
        if hasattr(worker, name):
            _wrap(worker, name, around)


def _wrap(owner: type, name: str, around: Any) -> None:
    """Replaces a method once per process."""
    plain = getattr(owner, name)
    if not hasattr(plain, "wrapped_by_lmcache"):
        wrapped: Any = functools.wraps(plain)(around(plain))
        wrapped.wrapped_by_lmcache = True
        setattr(owner, name, wrapped)


def _connector_of(core: EngineCore) -> Any:
    scheduler = getattr(core, "scheduler", None)  # there is none yet while the engine starts
    return None if scheduler is None else scheduler.get_kv_connector()


def _ours(connector: Any) -> list[LMCacheConnector]:
    """Returns the connector, or those inside it (`MultiConnector`), that are this one."""
    from lmcache_vllm.connector import LMCacheConnector

    return [each for each in (connector, *getattr(connector, "_connectors", ())) if isinstance(each, LMCacheConnector)]
