"""Prepares the environment of SGLang in tests when imported, which must happen before SGLang is: threads, and shims for a GPU.

The package does not contain the shims: they are in the folder of the adapter's tests, and used if there is no GPU and this is a
checkout, or if `TEST_LMCACHE_SHIMS` names their folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

VARIABLE = "TEST_LMCACHE_SHIMS"


def shims() -> Path | None:
    """Returns the folder of the shims, or None if it does not exist."""
    folder = Path(os.environ.get(VARIABLE) or Path(__file__).parents[2] / "tests" / "shims")
    return folder if (folder / "sglang_cpu_shims.py").is_file() else None


def on_cpu() -> bool:
    """Returns whether SGLang has no GPU to use."""
    return not torch.cuda.is_available()


def enter() -> None:
    """Sets up this process and its children for SGLang."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny, and spinning threads slow down other processes
    folder = shims()
    if not on_cpu() or folder is None:
        return
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    path = str(folder)
    if path not in sys.path:
        sys.path.insert(0, path)
    if path not in (given := os.environ.get("PYTHONPATH", "")).split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, given]))


enter()
