"""What decides KV besides weights and tokens, split in two: meaning and rounding.

*Meaning* is what the model computes: `meaning_of` digests its whole resolved configuration, minus a short list of fields that
provably change no KV. *Rounding* is how its arithmetic is carried out: torch's switches (`torch_switches`), environment
variables (`environment_switches`), and bits that were measured (`measured`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from blake3 import blake3

from lmcache.errors import SpecError

NEUTRAL_CONFIG: Mapping[str, str] = {
    "_name_or_path": "where the model was loaded from; weights have names of their own",
    "name_or_path": "as _name_or_path",
    "transformers_version": "what wrote the file; what computes is part of the numerics",
    "dtype": "rounding: part of the numerics and of the planes",
    "torch_dtype": "as dtype",
    "_attn_implementation": "rounding: part of the numerics",
    "_attn_implementation_internal": "rounding: part of the numerics",
    "attn_implementation": "rounding: part of the numerics",
    "_experts_implementation": "rounding: part of the numerics",
    "_experts_implementation_internal": "rounding: part of the numerics",
    "experts_implementation": "rounding: part of the numerics",
    "bos_token_id": "a token's KV does not depend on its role",
    "eos_token_id": "decides where an answer ends, not what a token's KV is",
    "use_cache": "whether KV is kept, not what it is",
    "output_attentions": "what else is returned",
    "output_hidden_states": "what else is returned",
    "return_dict": "how results are returned",
    "id2label": "names of classes",
    "label2id": "names of classes",
}
"""Fields of a Hugging Face configuration that change no KV, at any depth, each with the reason. Every other field separates."""


def meaning_of(config: Mapping[str, Any], neutral: Mapping[str, str] = NEUTRAL_CONFIG, **more: Any) -> str:
    """Returns a hex digest of a resolved model configuration, for `KVSpec.meaning`.

    Args:
        config: nested mappings of plain values. Other objects are named by their `repr`.
        neutral: keys that are left out at every depth.
        more: what else decides the values, e.g. fixed KV scales; None is left out.
    """
    extra = {name: value for name, value in sorted(more.items()) if value is not None}
    fields = [_plain(config, neutral), _plain(extra, {})]
    return str(blake3(json.dumps(fields, separators=(",", ":")).encode("utf-8", "surrogatepass")).hexdigest())


def _plain(value: Any, neutral: Mapping[str, str]) -> Any:
    """Converts to what JSON can express, without merging values of different types; mappings become sorted pairs."""
    if isinstance(value, Mapping):
        alias = (
            "type" if "type" in value and value["type"] == value.get("rope_type") else None
        )  # as older files spell it
        pairs = ([str(k), _plain(v, neutral)] for k, v in value.items() if k not in neutral and k != alias)
        return {"map": sorted(pairs, key=lambda pair: pair[0])}
    if isinstance(value, (list, tuple)):
        return [_plain(v, neutral) for v in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(json.dumps(_plain(v, neutral)) for v in value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"repr": repr(value)}


def depends_on_length(config: Any) -> bool:
    """Whether rope's factors are chosen by the longest sequence: `longrope`, and any kind named after it or `dynamic`."""
    if isinstance(config, Mapping):
        kinds = [str(config.get(key, "")) for key in ("rope_type", "type")]
        if any("longrope" in kind or "dynamic" in kind or kind == "su" for kind in kinds):
            return True
        return any(depends_on_length(value) for value in config.values())
    return isinstance(config, (list, tuple)) and any(depends_on_length(value) for value in config)


# ------------------------------------------------------------------ rounding

_ENVIRONMENT = (
    "ATEN_CPU_",
    "BLIS_",
    "CUBLAS",
    "CUDNN_",
    "DISABLE_ADDMM_",
    "DNNL_",
    "FLASH_ATTENTION_",
    "HIPBLAS",
    "KMP_DETERMINISTIC",
    "MIOPEN_",
    "MKL_",
    "NVIDIA_TF32_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_TUNABLEOP_",
    "ROCBLAS_",
    "TORCH_ALLOW_TF32_",
    "TORCH_BLAS_",
    "TORCH_CUDNN_",
    "TORCH_LINEAR_",
    "TORCHINDUCTOR_",
)
"""Beginnings of environment variables by which libraries choose arithmetic."""

_NEUTRAL_ENVIRONMENT: Mapping[str, str] = {
    "ONEDNN_VERBOSE": "prints",
    "DNNL_VERBOSE": "prints",
    "MKL_VERBOSE": "prints",
    "MKL_NUM_THREADS": "torch's number of threads is named instead",
    "MKL_SERVICE_FORCE_INTEL": "which OpenMP runtime is accepted; its threads are named by their number",
    "OPENBLAS_NUM_THREADS": "torch's number of threads is named instead",
    "TORCHINDUCTOR_CACHE_DIR": "where compiled code is kept",
    "TORCHINDUCTOR_COMPILE_THREADS": "how fast code is compiled",
    "PYTORCH_TUNABLEOP_VERBOSE": "prints",
}


def environment_switches(environment: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
    """Returns the environment variables that choose arithmetic, sorted. Usually there are none."""
    given = os.environ if environment is None else environment
    found = (name for name in given if name.startswith(_ENVIRONMENT) and name not in _NEUTRAL_ENVIRONMENT)
    return tuple((name, given[name]) for name in sorted(found))


def torch_switches(device: str) -> tuple[tuple[str, str], ...]:
    """Returns torch's process-wide switches that choose arithmetic on `device` (a type such as `cpu` or `cuda`).

    Those at torch's defaults are left out, except for the number of threads.
    """
    backends: Any = torch.backends
    found: dict[str, object] = {
        "deterministic": torch.are_deterministic_algorithms_enabled() or None,
        "flash_sdp": _unless(True, backends.cuda.flash_sdp_enabled),
        "mem_efficient_sdp": _unless(True, backends.cuda.mem_efficient_sdp_enabled),
        "math_sdp": _unless(True, backends.cuda.math_sdp_enabled),
        "fp32_precision": _unless("none", lambda: backends.fp32_precision),
        "flush_denormal": _flushes_denormals() or None,
    }
    if device == "cpu":
        mkldnn = backends.mkldnn
        found |= {
            "threads": torch.get_num_threads(),
            "mkldnn": _unless(True, lambda: mkldnn.enabled and mkldnn.is_available()),
            "mkldnn_deterministic": _unless(False, lambda: mkldnn.deterministic),
        }
        for part in ("", "matmul", "conv", "rnn"):
            where = getattr(mkldnn, part, mkldnn) if part else mkldnn
            found[f"mkldnn_{part or 'all'}_fp32"] = _unless("none", partial(getattr, where, "fp32_precision"))
    else:
        found |= {
            "cudnn_sdp": _unless(True, backends.cuda.cudnn_sdp_enabled),
            "cudnn": _unless(True, lambda: backends.cudnn.enabled),
            "cudnn_benchmark": _unless(False, lambda: backends.cudnn.benchmark),
            "cudnn_deterministic": _unless(False, lambda: backends.cudnn.deterministic),
            "fp16_math_sdp": _unless(False, backends.cuda.fp16_bf16_reduction_math_sdp_allowed),
            "blas": str(_unless(None, lambda: backends.cuda.preferred_blas_library())),
        }
        for flag in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
            found[flag] = _unless(True, partial(getattr, backends.cuda.matmul, flag))
        found["allow_fp16_accumulation"] = _unless(False, lambda: backends.cuda.matmul.allow_fp16_accumulation)
        for name, where in (("cuda", backends.cuda.matmul), ("cudnn_conv", getattr(backends.cudnn, "conv", None))):
            found[f"{name}_fp32"] = _unless("none", partial(getattr, where, "fp32_precision"))
    found["float32_matmul_precision"] = _unless("highest", torch.get_float32_matmul_precision)
    return tuple((name, str(value)) for name, value in found.items() if value is not None)


def _unless(default: object, read: Callable[[], object]) -> object:
    """Returns what a switch is set to; None if it is at its default, or this torch does not have it."""
    try:
        value = read()
    except Exception:  # the switch does not exist, or the old and the new interface for precision are mixed
        return None
    return None if value == default else value


def _flushes_denormals() -> bool:
    tiny = torch.tensor([1e-310], dtype=torch.float64, device="cpu")
    return float(tiny * 1.0) == 0.0


def measured(run: Callable[[], Iterable[torch.Tensor]]) -> str:
    """Runs a computation on fixed inputs twice and returns a digest of its bits; empty if the two runs differ.

    Args:
        run: runs the engine's own matmul and attention; returns the results.
    """
    first, second = _bits(run()), _bits(run())
    return first if first == second else ""


@torch.no_grad()
def _bits(tensors: Iterable[torch.Tensor]) -> str:
    digest = blake3(b"lmcache probe 1")
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return str(digest.hexdigest(16))


def fixed_input(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Returns values in [−1, 1) that are the same on every machine; the random state is not touched."""
    count = 1
    for size in shape:
        count *= size
    if count >= 2**31:
        raise SpecError(f"a probe of {count} elements is too large")
    scrambled = torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * 2654435761 % 2**32
    return (scrambled.to(torch.float64) / 2**31 - 1).reshape(shape).to(dtype).to(device)
