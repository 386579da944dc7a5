"""Marks of the suite's tests: to which level one belongs, and which claimed capability it needs."""

from __future__ import annotations

import pytest

from lmcache_conformance.contract import Level

LEVEL = "lmcache_level"
REQUIRES = "lmcache_requires"


def level(which: Level) -> pytest.MarkDecorator:
    """This test proves something of `which`; reports are grouped by it."""
    return pytest.mark.lmcache_level(which.value)


def requires(*capabilities: str) -> pytest.MarkDecorator:
    """Skip, with the reason in the report, unless the class under test claims all of these in its `capabilities`."""
    return pytest.mark.lmcache_requires(*capabilities)
