"""The control plane: decides what is cached where, what is leased and what is evicted; see `lmcache.control.index`."""

from lmcache.control.index import Index
from lmcache.control.outcomes import Finished, Lookup, Owner, Store, TierInfo

__all__ = ["Finished", "Index", "Lookup", "Owner", "Store", "TierInfo"]
