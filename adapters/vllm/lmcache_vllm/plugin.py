"""What vLLM calls at start-up in each of its processes (entry point group `vllm.general_plugins`)."""

from __future__ import annotations

NAME = "LMCacheConnector"


def register() -> None:
    """Make the connector known by its short name. Called more than once in a process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "lmcache_vllm.connector", NAME)
