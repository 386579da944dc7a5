"""Keeps old import paths of moved modules working, with a `DeprecationWarning` that contains the new path.

The finder is last on `sys.meta_path`, so it is only called for modules that no other finder finds.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "lmcache.admission": "lmcache.control.admission",
        "lmcache.arena": "lmcache.transfer.arena",
        "lmcache.eviction": "lmcache.control.eviction",
        "lmcache.hit": "lmcache.engine",
        "lmcache.index": "lmcache.control",
        "lmcache.ledger": "lmcache.transfer.jobs",
        "lmcache.log": "lmcache.observe.log",
        "lmcache.loop": "lmcache.driver",
        "lmcache.machine": "lmcache.config.machine",
        "lmcache.metrics": "lmcache.observe.metrics",
        "lmcache.mover": "lmcache.transfer.engine_copy",
        "lmcache.objectfile": "lmcache.format.file",
        "lmcache.objectheader": "lmcache.format.header",
        "lmcache.objectio": "lmcache.format.codec",
        "lmcache.objects": "lmcache.keyed",
        "lmcache.proof": "lmcache.layout.proof",
        "lmcache.recorder": "lmcache.observe.recorder",
        "lmcache.reslice": "lmcache.format.reslice",
        "lmcache.settings": "lmcache.config.settings",
        "lmcache.tiers.configured": "lmcache.tiers",
        "lmcache.workers": "lmcache.transfer.workers",
        "lmcache_conformance.adopt": "lmcache_conformance.runner.capability_skips",
        "lmcache_conformance.cache": "lmcache_conformance.suites.cache",
        "lmcache_conformance.child": "lmcache_conformance.remote.child",
        "lmcache_conformance.cross": "lmcache_conformance.suites.cross",
        "lmcache_conformance.damage": "lmcache_conformance.labs.damage",
        "lmcache_conformance.index": "lmcache_conformance.suites.index",
        "lmcache_conformance.kernels": "lmcache_conformance.suites.kernels",
        "lmcache_conformance.keys": "lmcache_conformance.suites.keys",
        "lmcache_conformance.layouts": "lmcache_conformance.suites.layouts",
        "lmcache_conformance.marks": "lmcache_conformance.runner.marks",
        "lmcache_conformance.models": "lmcache_conformance.labs.models",
        "lmcache_conformance.onefailure": "lmcache_conformance.runner.one_failure",
        "lmcache_conformance.splits": "lmcache_conformance.labs.splits",
        "lmcache_conformance.tiers": "lmcache_conformance.suites.tiers",
        "lmcache_hf.conformance": "lmcache_hf.testing.conformance",
        "lmcache_hf.session": "lmcache_hf.testing.session",
        "lmcache_sglang.conformance": "lmcache_sglang.testing.conformance",
        "lmcache_sglang.environment": "lmcache_sglang.testing.environment",
        "lmcache_vllm.conformance": "lmcache_vllm.testing.conformance",
        "lmcache_vllm.environment": "lmcache_vllm.testing.environment",
        "lmcache_vllm.session": "lmcache_vllm.testing.session",
    }
)
"""Old module → new module."""

NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "lmcache.control.admission.rules": {"SecondSight": "SecondHit"},
        "lmcache.driver": {"ControlLoop": "Driver"},
        "lmcache.format.codec": {"ObjectIO": "ObjectCodec"},
        "lmcache.keyed": {"Objects": "KeyedCache"},
        "lmcache.plan": {"Slot": "ArenaSlot"},
        "lmcache.transfer.engine_copy": {
            "DeviceMover": "DeviceCopier",
            "HostMover": "HostCopier",
            "Mover": "EngineCopier",
            "open_mover": "open_copier",
        },
        "lmcache.transfer.jobs": {"Ledger": "JobTracker", "Run": "ActiveJob"},
    }
)
"""New module → old name → new name of renamed definitions."""


class _Alias(Loader):
    """Loads an old path as a module that forwards to the new module; also accepts old names."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MODULES[spec.name]
        warnings.warn(f"{spec.name} has moved: import {new}", DeprecationWarning, stacklevel=2)
        target, renamed = importlib.import_module(new), NAMES.get(new, {})
        alias = ModuleType(spec.name, f"Moved to `{new}`.")

        def look_up(name: str) -> object:
            if not name.startswith("__") and hasattr(target, found := renamed.get(name, name)):
                return getattr(target, found)
            raise AttributeError(f"{spec.name} has moved to {new}, which has no {name!r}")

        alias.__getattr__ = look_up  # type: ignore[method-assign]
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: the module needs no execution."""


class _Finder(MetaPathFinder):
    """Finds modules by their old paths."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Alias()) if name in MODULES else None


def renamed(module: str) -> Callable[[str], object]:
    """Returns a `__getattr__` for a module with renamed definitions, which still resolves the old names."""

    def look_up(name: str) -> object:
        new = NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {module}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new)

    return look_up


def install() -> None:
    """Makes old paths importable in this process. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
