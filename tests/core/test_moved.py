"""Old import paths still work, and say where the module is now."""

from __future__ import annotations

import importlib
import sys

import pytest

import lmcache.plan
from lmcache import moved

ENGINES = ("vllm", "sglang")


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_an_old_module_path_hands_out_the_new_modules_names(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = moved.MODULES[old]
    if any(f"lmcache_{engine}" in new and importlib.util.find_spec(engine) is None for engine in ENGINES):
        pytest.skip(f"{new} needs an engine that is not installed here")
    if "lmcache_sglang" in new or new == "lmcache_vllm.testing.environment":
        pytest.skip("importing it prepares this process for an engine")
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved: import {new}"):
        alias = importlib.import_module(old)
    target = importlib.import_module(new)
    public = [name for name in vars(target) if not name.startswith("_")]
    assert public
    assert all(getattr(alias, name) is getattr(target, name) for name in public)
    with pytest.raises(AttributeError, match=f"has moved to {new}"):
        alias.NoSuchThing  # noqa: B018


def test_renamed_names_are_handed_out_under_their_old_ones() -> None:
    for module, names in moved.NAMES.items():
        for new in names.values():
            assert hasattr(importlib.import_module(module), new), f"{module} has no {new}"
    with pytest.warns(DeprecationWarning, match="lmcache.plan.Slot is now lmcache.plan.ArenaSlot"):
        assert lmcache.plan.Slot is lmcache.plan.ArenaSlot  # type: ignore[attr-defined]


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lmcache.no_such_module")
