"""The Triton kernels under Triton's interpreter, on host memory, beside the compiled ones in the same process."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from types import ModuleType
from unittest import mock

import pytest


@functools.cache
def interpreted(name: str) -> ModuleType:
    """A second copy of `lmcache_kernels.<name>` whose kernels are run by the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    original = importlib.util.find_spec(f"lmcache_kernels.{name}")
    assert original is not None
    assert original.origin is not None
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", original.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton looks a kernel's module up
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # read when a function is decorated
        spec.loader.exec_module(module)
    return module
