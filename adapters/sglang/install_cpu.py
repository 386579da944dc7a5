"""Install SGLang from PyPI into the environment of the Python that runs this, beside the torch (and vLLM) that is there.

    python adapters/sglang/install_cpu.py [pip arguments, such as --constraint constraints.txt]

On a machine with a GPU, `pip install 'lmcache-sdk[sglang]'` is all it takes. SGLang's own requirements pin CUDA packages and one
version each of torch, transformers and xgrammar, so without a GPU, or beside vLLM, this installs the package alone, then what its
text models import. `sglang-kernel` (CUDA binaries) is left out; tests use the shims in `adapters/sglang/tests/shims` instead.
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
"""vLLM pins these: what it has brought stays."""


def main() -> None:
    """Install, or find that it is there."""
    arguments = sys.argv[1:]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *arguments]
    missing = [name for name in BESIDE_VLLM if importlib.util.find_spec(name) is None]
    subprocess.run([*pip, *NEEDED.split(), *missing], check=True)
    subprocess.run([*pip, "--no-deps", f"sglang=={VERSION}"], check=True)  # last: pip would complain of its pins


if __name__ == "__main__":
    main()
