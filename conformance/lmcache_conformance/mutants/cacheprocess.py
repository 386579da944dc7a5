"""Caches that are right in a process to which nothing happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from lmcache import CacheEngine
from lmcache.driver import Driver
from lmcache.tiers.disk import DiskTier
from lmcache_conformance.mutants import BEYOND, mutant
from lmcache_conformance.mutants.brokencache import BrokenCache
from lmcache_conformance.suites.cache_process import CacheProcessTests


class BrokenCacheProcessTests(BrokenCache, CacheProcessTests):
    """For caches that are wrong after something has happened to their process."""


class _Interruptible(CacheEngine):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        for name, method in vars(Driver).items():
            if hasattr(method, "__wrapped__"):
                setattr(self._driver, name, method.__wrapped__.__get__(self._driver))


@mutant(row="pins leak until nothing can be stored", project="Ctrl-C in a notebook")
class MutantInterruptible(BrokenCacheProcessTests):
    """An interrupt ends a change of state half-way."""

    cache_class = _Interruptible
    patience = 3.0


class _ForkBlind(CacheEngine):
    def _follow_fork(self) -> None:
        pass


@mutant(row=BEYOND + "a forked child waits for threads that it does not have", project="gunicorn --preload, DataLoader")
class MutantForkBlind(BrokenCacheProcessTests):
    """A forked child goes on with what it has inherited."""

    cache_class = _ForkBlind
    patience = 5.0


if os.geteuid() == 0:  # the test needs root, to give files to another user

    @mutant(row="another request's KV served from disk", project="folders that several users can write to")
    class MutantTrustsEverybody(BrokenCacheProcessTests):
        """Files are served whoever has written them."""

        @pytest.fixture(autouse=True)
        def _trusting(self) -> Iterator[None]:
            with (
                mock.patch.object(DiskTier, "_is_foreign", return_value=False),
                mock.patch("lmcache.tiers.disk.check_folder", return_value=False),
                mock.patch("lmcache.tiers.disk.discard_foreign"),
            ):
                yield
