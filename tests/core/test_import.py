"""`import lmcache` is fast, imports no engine, and every public name resolves."""

from __future__ import annotations

import subprocess
import sys

import lmcache

ENGINES = ("torch", "numpy", "transformers", "vllm", "sglang", "lmcache_hf", "prometheus_client", "typer")


def _modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_neither_torch_nor_an_engine() -> None:
    assert not _modules_after("import lmcache").intersection(ENGINES)


def test_importing_everything_public_imports_no_engine_or_adapter() -> None:
    loaded = _modules_after("import lmcache\nfor name in lmcache.__all__: getattr(lmcache, name)")
    assert "lmcache.spec" in loaded
    assert not loaded.intersection(("transformers", "vllm", "sglang", "lmcache_hf"))


def test_public_names_resolve_and_are_listed() -> None:
    for name in lmcache.__all__:
        value = getattr(lmcache, name)
        assert name == "__version__" or value.__name__ == name
    assert set(lmcache.__all__) <= set(dir(lmcache))
    assert lmcache.__version__[0].isdigit()


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(lmcache, "NoSuchThing")
