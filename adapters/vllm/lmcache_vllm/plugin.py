"""Plugin that vLLM calls at start-up in each of its processes (entry point group `vllm.general_plugins`)."""

from __future__ import annotations

NAME = "LMCacheConnector"


def register() -> None:
    """Registers the connector under its short name. May be called more than once per process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "lmcache_vllm.connector", NAME)
