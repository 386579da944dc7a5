"""The data plane of one rank: executes plans, moves bytes, decides nothing."""

from lmcache.transfer.jobs import EngineView
from lmcache.transfer.transfer import Transfer

__all__ = ["EngineView", "Transfer"]
