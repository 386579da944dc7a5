"""SGLang's environment for tests, on import and before SGLang's: quiet threads, a checkout's stand-ins where there is no GPU.

The package ships nothing that stands in for a GPU. The shims lie in the adapter's tests; they are used where there is no GPU
and this is a checkout, or `TEST_LMCACHE_SHIMS` names their folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

VARIABLE = "TEST_LMCACHE_SHIMS"


def shims() -> Path | None:
    """The folder of the shims, or None where there is none."""
    folder = Path(os.environ.get(VARIABLE) or Path(__file__).parents[2] / "tests" / "shims")
    return folder if (folder / "sglang_cpu_shims.py").is_file() else None


def on_cpu() -> bool:
    """There is no GPU that SGLang could use."""
    return not torch.cuda.is_available()


def enter() -> None:
    """Make this process, and those that it starts, fit for SGLang."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, and threads that spin harm whoever shares the machine
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
