"""Marks of the suite's tests: the level of a test, and the capabilities that it requires."""

from __future__ import annotations

import pytest

from lmcache_conformance.contract import Level

LEVEL = "lmcache_level"
REQUIRES = "lmcache_requires"


def level(which: Level) -> pytest.MarkDecorator:
    """Marks a test as belonging to level `which`; reports are grouped by level."""
    return pytest.mark.lmcache_level(which.value)


def requires(*capabilities: str) -> pytest.MarkDecorator:
    """Skips a test, with the reason in the report, unless the class under test claims all of these capabilities."""
    return pytest.mark.lmcache_requires(*capabilities)
