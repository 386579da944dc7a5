"""Installs SGLang from PyPI into the running Python's environment, next to the installed torch (and vLLM).

    python adapters/sglang/install_cpu.py [pip arguments, such as --constraint constraints.txt]

With a GPU, `pip install 'lmcache-sdk[sglang]'` is enough. SGLang's requirements pin CUDA packages and one version each of torch,
transformers and xgrammar. So without a GPU, or next to vLLM, this installs what SGLang's text models import, then the package
without its requirements. `sglang-kernel` (CUDA binaries) is skipped; tests use the shims in `adapters/sglang/tests/shims`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

VERSION = "0.5.23"
NEEDED = """
    transformers sentencepiece tiktoken scipy aiohttp fastapi uvicorn uvloop requests pyzmq psutil setproctitle orjson msgspec
    pydantic python-multipart pillow einops tqdm ipython prometheus-client pybase64 partial_json_parser regex interegular
    soundfile zstandard xxhash watchfiles compressed-tensors gguf llguidance>=1.7.6,<2 cloudpickle ninja dill
"""
BESIDE_VLLM = ("xgrammar", "openai")
"""vLLM pins these: an installed version is kept."""


def main() -> None:
    """Installs SGLang and what its text models import."""
    arguments = sys.argv[1:]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *arguments]
    missing = [name for name in BESIDE_VLLM if importlib.util.find_spec(name) is None]
    subprocess.run([*pip, *NEEDED.split(), *missing], check=True)
    subprocess.run(
        [*pip, "--no-deps", f"sglang=={VERSION}"], check=True
    )  # last: otherwise pip complains about its pins


if __name__ == "__main__":
    main()
