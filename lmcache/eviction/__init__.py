from lmcache.eviction.classic import *
