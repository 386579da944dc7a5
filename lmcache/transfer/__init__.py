"""The data plane of one rank: executes plans, copies bytes, makes no decisions."""

from lmcache.transfer.jobs import EngineView
from lmcache.transfer.transfer import Transfer

__all__ = ["EngineView", "Transfer"]
