"""Plugin that vLLM calls at start-up in each of its processes (entry point group `vllm.general_plugins`).

It registers the connector's name, and adds a step to the end of `VllmConfig.__post_init__`: a configuration that cannot be cached
loses its connector, with one line that says why. vLLM would stop on some of them with any connector (encoder-decoder models).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.engine.core import EngineCore

NAME = "LMCacheConnector"


def register() -> None:
    """Registers the connector under its short name, and the check of configurations. May be called more than once per process."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "lmcache_vllm.connector", NAME)
    if not hasattr(VllmConfig.__post_init__, "__wrapped__"):
        VllmConfig.__post_init__ = _checked(VllmConfig.__post_init__)


def _checked(resolve: Any) -> Any:
    @functools.wraps(resolve)
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


def watch_loras() -> None:
    """Tells the connector which adapters vLLM loads before their first request: their files may be replaced between the two."""
    from vllm.v1.engine.core import EngineCore

    load = EngineCore.add_lora
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def add_lora(core: EngineCore, lora_request: Any) -> bool:
        connector = core.scheduler.get_kv_connector()
        watchers = [
            loras
            for each in (connector, *getattr(connector, "_connectors", ()))
            if (loras := getattr(each, "loras", None))
        ]
        for loras in watchers:
            loras.loading(lora_request)
        result = load(core, lora_request)
        for loras in watchers:
            loras.loaded(lora_request)
        return bool(result)

    EngineCore.add_lora = add_lora
