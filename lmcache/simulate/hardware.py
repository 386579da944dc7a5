"""Estimates bytes and time per token from model shapes, devices and links. For capacity planning; not measurements.

Shapes are from the models' published `config.json`; peak FLOP/s (dense, 16 bit) and link speeds from vendors' data sheets.
`mfu` (model FLOPs utilization) is the assumed share of the peak reached in prefill; links and disks are given the throughput
that copies usually reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lmcache.config.settings import named
from lmcache.errors import ConfigError


class Model(NamedTuple):
    """`kv_bytes`: bytes per token, 16 bit. `params`: active per token. `attention`: layers × query heads × head size."""

    kv_bytes: int
    params: float
    attention: int


class Device(NamedTuple):
    """Peak FLOP/s, the share of it reached in prefill, and bytes per second from DRAM and from disk."""

    flops: float
    mfu: float
    dram: float
    disk: float


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        # 2 (K, V) × layers × KV heads × head size × 2 bytes
        "llama-3-8b": Model(2 * 32 * 8 * 128 * 2, 8.03e9, 32 * 32 * 128),
        "llama-3-70b": Model(2 * 80 * 8 * 128 * 2, 70.6e9, 80 * 64 * 128),
        "qwen2.5-7b": Model(2 * 28 * 4 * 128 * 2, 7.62e9, 28 * 28 * 128),
        "qwen3-8b": Model(2 * 36 * 8 * 128 * 2, 8.19e9, 36 * 32 * 128),
        # latent attention: 61 layers × (512 + 64) × 2 bytes; 37 B of 671 B parameters are active; heads of 192 (QK), 128 (V)
        "deepseek-v3": Model(61 * 576 * 2, 37e9, 61 * 128 * 160),
        "smollm2-135m": Model(2 * 30 * 3 * 64 * 2, 0.135e9, 30 * 9 * 64),
    }
)
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h100": Device(989e12, 0.5, 50e9, 6e9),  # SXM; PCIe 5 ×16: 64 GB/s raw; one PCIe 4 NVMe
        "h200": Device(989e12, 0.5, 50e9, 6e9),
        "b200": Device(2250e12, 0.45, 50e9, 12e9),  # PCIe 5 NVMe
        "a100": Device(312e12, 0.5, 24e9, 6e9),  # PCIe 4 ×16: 32 GB/s raw
        "l40s": Device(362e12, 0.5, 24e9, 6e9),
        "mi300x": Device(1307e12, 0.4, 50e9, 6e9),
    }
)


class Profile(NamedTuple):
    """A model on `gpus` devices. With `rate`, prefill takes 1/rate seconds per token at every position."""

    kv_bytes: int
    model: Model | None
    device: Device
    gpus: int = 1
    rate: float | None = None

    def prefill_s(self, start: int, end: int) -> float:
        """Returns the seconds to compute tokens [start, end) of a prompt.

        2 FLOP per active parameter and token, plus 2 × `attention` × (end² − start²) for causal attention (QKᵀ and PV).
        """
        if self.rate is not None:
            return (end - start) / self.rate
        assert self.model is not None
        flops = 2 * self.model.params * (end - start) + 2 * self.model.attention * (end * end - start * start)
        return flops / (self.device.flops * self.device.mfu * self.gpus)

    def load_s(self, place: str, tokens: int) -> float:
        """Returns the seconds to load the KV of `tokens` tokens from `dram` or `disk`; 0 from device memory."""
        speed = {"dram": self.device.dram * self.gpus, "disk": self.device.disk}.get(place)
        return tokens * self.kv_bytes / speed if speed else 0.0


def profile(
    model: str, device: str, *, gpus: int = 1, kv_bytes: int | None = None, rate: float | None = None
) -> Profile:
    """Looks up a profile by name. `kv_bytes` (per token) and `rate` (prefill tokens per second) override the estimates.

    Raises:
        ConfigError: an unknown name (the message has the nearest one), or an invalid number.
    """
    shape = named(model, MODELS, "model")
    if gpus < 1 or (kv_bytes is not None and kv_bytes < 1) or (rate is not None and not 0 < rate < math.inf):
        raise ConfigError(f"impossible: gpus={gpus}, KV bytes per token={kv_bytes}, prefill tokens per second={rate}")
    return Profile(kv_bytes or shape.kv_bytes, shape, named(device, DEVICES, "device"), gpus, rate)
