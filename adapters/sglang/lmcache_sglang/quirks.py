"""Everything that differs between SGLang releases, in one place. The rest of the adapter asks here."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from blake3 import blake3

from lmcache.config import Config
from lmcache.identity import model_identity
from lmcache.log import LOGGER
from lmcache.spec import Numerics, dtype_name, host_isa

TESTED = ("0.5.23",)
"""Releases that this adapter's tests run with."""

OLDEST = (0, 5, 23)
"""Before it, host pools and the storage interface were other ones."""

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


class UnsupportedError(Exception):
    """This SGLang, or this way of running it, cannot be cached; the message says why."""


def check_version() -> str:
    """A sentence to warn with if this release was never tested, or empty.

    Raises:
        UnsupportedError: it is known not to work.
    """
    version = _version()
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers and numbers < OLDEST:
        raise UnsupportedError(f"SGLang {version} is too old; the backend needs {'.'.join(map(str, OLDEST))} or newer")
    if version.split("+")[0] in TESTED:
        return ""
    return (
        f"SGLang {version} was never tested with this backend, only {', '.join(TESTED)}; the layout proof still holds"
    )


def _version() -> str:
    import sglang

    return str(sglang.__version__)


def join_log() -> None:
    """Say things where SGLang says its own, unless the application has decided where our lines go.

    SGLang configures the root logger in its scheduler processes, which is where ours go by themselves; only the level is set.
    """
    if LOGGER.level == logging.NOTSET and logging.getLogger().isEnabledFor(logging.INFO):
        LOGGER.setLevel(logging.INFO)


def check_config(config: Any) -> None:
    """Refuse ways of running whose pages would not be whole, or not be named right.

    Args:
        config: SGLang's `HiCacheStorageConfig`.

    Raises:
        UnsupportedError: naming the option.
    """
    if config.attn_cp_size > 1:
        raise UnsupportedError("context parallelism (attn_cp_size) gives each rank a part of every page: not supported")
    if config.dcp_size > 1:
        raise UnsupportedError("decode context parallelism gives each rank a part of every page: not supported")
    if config.should_split_heads:
        raise UnsupportedError("tp_lcm_size splits pages by heads: not supported")
    arguments = _arguments()
    if arguments is not None and getattr(arguments, "speculative_algorithm", None) and config.pp_size > 1:
        raise UnsupportedError("speculative decoding with pipeline parallelism is not supported")


def identity_of(config: Config) -> str:
    """What the weights are, with everything that SGLang may have changed about the model's configuration.

    Raises:
        UnsupportedError: nobody can tell; set `model_identity`.
    """
    if config.model_identity:
        return config.model_identity
    arguments = _arguments()
    if arguments is None:
        raise UnsupportedError("SGLang does not say which model it serves here; set model_identity")
    if str(arguments.load_format) == "dummy":
        raise UnsupportedError(
            "load_format=dummy: random weights have no identity; set model_identity to give them one"
        )
    path, revision = str(arguments.model_path), getattr(arguments, "revision", None)
    identity = model_identity(f"{path}@{revision}" if revision else path, fingerprint=config.fingerprint)
    changed = str(getattr(arguments, "json_model_override_args", "") or "{}")
    if changed.strip() != "{}":
        identity += " overrides " + blake3(changed.encode()).hexdigest()
    return identity


def numerics_of(config: Any) -> Numerics:
    """Everything beside weights and tokens that decides the bits of KV in this rank."""
    arguments = _arguments()
    device = str(getattr(arguments, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.startswith("cuda"):
        isa = f"{torch.cuda.get_device_name()} sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    else:
        isa = host_isa() if device.startswith("cpu") else device
    options = (
        "kv_cache_dtype",
        "quantization_param_path",
        "speculative_algorithm",
        "enable_deterministic_inference",
        "enable_torch_compile",
        "rl_on_policy_target",
    )
    extra = [(name, str(value)) for name in options if (value := getattr(arguments, name, None))]
    if device.startswith("cpu"):
        extra.append(("threads", str(torch.get_num_threads())))
    return Numerics(
        engine="sglang",
        engine_version=f"{_version()} torch {torch.__version__}",
        attention_backend=", ".join(sorted(set(map(str, _attention_backends(arguments))))),
        isa=isa,
        dtype=_dtype(arguments),
        quantization=str(getattr(arguments, "quantization", None) or ""),
        tp=int(config.tp_size),
        pp=int(config.pp_size),
        extra=tuple(extra),
    )


def _arguments() -> Any:
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:  # a host pool without a server around it, or another release
        return None


def _attention_backends(arguments: Any) -> tuple[Any, ...]:
    try:
        from sglang.srt.runtime_context import attention_backends

        return tuple(attention_backends())
    except Exception:
        return (getattr(arguments, "attention_backend", None) or "",)


def _dtype(arguments: Any) -> str:
    try:
        return dtype_name(torch.get_default_dtype()) if arguments is None else str(arguments.dtype)
    except Exception:
        return ""


_watchers: list[weakref.WeakMethod[Callable[[], None]]] = []
"""Of this process. SGLang hooks a function once, and storages come and go (`attach_hicache_storage`)."""


def watch_weights(changed: Callable[[], None]) -> None:
    """Have the method `changed` called whenever this process's weights were replaced under their name, or may have been.

    By SGLang's own hooks for plugins: HiCache flushes its radix tree and its queues then, but tells no storage.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _watchers.append(weakref.WeakMethod(changed))
    if len(_watchers) > 1:
        return

    def around(update: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return update(*arguments, **named)
        finally:
            for watcher in _watchers:
                if (told := watcher()) is not None:
                    told()

    for name in ("disk", "distributed", "tensor", "ipc"):
        HookRegistry.register(f"{_UPDATER}.update_weights_from_{name}", around, HookType.AROUND)
    HookRegistry.apply_hooks()
