"""The control plane: `Index` decides what exists where. See `lmcache.index.core`; reasons are in `lmcache.index.messages`."""

from lmcache.index.core import Index
from lmcache.index.messages import Finished, Lookup, Owner, Store, TierInfo

__all__ = ["Finished", "Index", "Lookup", "Owner", "Store", "TierInfo"]
