"""Everything that differs between SGLang releases, in one place."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from lmcache import adapter
from lmcache.adapter import UnsupportedError
from lmcache.config import Config
from lmcache.identity import model_identity
from lmcache.numerics import depends_on_length, environment_switches, meaning_of, torch_switches
from lmcache.spec import Numerics, dtype_name, host_isa

TESTED = ("0.5.23",)
"""Releases that this adapter is tested with."""

OLDEST = (0, 5, 23)
"""Older releases have different host pools and another storage interface."""

PICTURE = 1_000_000
"""Token ids from here on are SGLang's placeholders for images and audio, made from their digests (its `MM_PAD_SHIFT_VALUE`)."""

_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_LINK = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


def check_version() -> str:
    """Returns a warning if this release is untested, else an empty string.

    Raises:
        UnsupportedError: this release is known not to work.
    """
    return adapter.check_version("SGLang", _version(), tested=TESTED, oldest=OLDEST, component="backend")


def _version() -> str:
    import sglang

    return str(sglang.__version__)


def check_config(config: Any) -> None:
    """Rejects options under which a rank's pages would be incomplete, or their keys ambiguous.

    Args:
        config: SGLang's `HiCacheStorageConfig`.

    Raises:
        UnsupportedError: with the name of the option.
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
    """Returns the identity of the weights for cache keys.

    Raises:
        UnsupportedError: the identity is unknown; `model_identity` has to be set.
    """
    if config.model_identity:
        return config.model_identity
    arguments = _arguments()
    if arguments is None:
        raise UnsupportedError(
            "SGLang's server arguments are not available here, so the model is unknown; set model_identity"
        )
    if str(arguments.load_format) == "dummy":
        raise UnsupportedError(
            "load_format=dummy: random weights have no identity; set model_identity to give them one"
        )
    path, revision = str(arguments.model_path), getattr(arguments, "revision", None)
    return model_identity(
        path,
        fingerprint=config.fingerprint,
        revision=revision or None,
        hub_cache=getattr(arguments, "download_dir", None) or None,
    )


def meaning() -> str:
    """Returns the digest of what the model computes besides its weights: its resolved configuration and fixed KV scales.

    Empty where the server's arguments are not available.

    Raises:
        UnsupportedError: the configuration or the scales cannot be read.
    """
    arguments = _arguments()
    if arguments is None:
        return ""
    scales = getattr(arguments, "quantization_param_path", None)
    try:
        from sglang.srt.utils.hf_transformers import get_config

        config = get_config(
            str(arguments.model_path),
            trust_remote_code=bool(getattr(arguments, "trust_remote_code", False)),
            revision=getattr(arguments, "revision", None),
            model_override_args=json.loads(str(getattr(arguments, "json_model_override_args", "") or "{}")),
            model_config_parser=str(getattr(arguments, "model_config_parser", "auto") or "auto"),
        ).to_dict()
        digest = blake3(Path(scales).read_bytes()).hexdigest() if scales else None
    except Exception as error:
        raise UnsupportedError(f"the model's configuration cannot be read: {type(error).__name__}: {error}") from error
    length = getattr(arguments, "context_length", None) if depends_on_length(config) else None
    return meaning_of(config, kv_scales=digest, max_model_len=length)


def numerics_of(tp: int, pp: int) -> Numerics:
    """Returns everything besides weights and tokens that determines the bits of KV on this rank."""
    arguments = _arguments()
    device = str(getattr(arguments, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.startswith("cuda"):
        isa = f"{torch.cuda.get_device_name()} sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    else:
        isa = host_isa() if device.startswith("cpu") else device
    options = (
        "kv_cache_dtype",
        "speculative_algorithm",
        "enable_deterministic_inference",
        "enable_torch_compile",
        "rl_on_policy_target",
    )
    extra = [(name, str(value)) for name in options if (value := getattr(arguments, name, None))]
    extra += torch_switches(device.partition(":")[0])
    if not device.startswith("cpu"):
        isa = " ".join([isa, *(f"{name}={value}" for name, value in environment_switches())])
    return Numerics(
        engine="sglang",
        engine_version=f"{_version()} torch {torch.__version__}",
        attention_backend=", ".join(sorted(set(map(str, _attention_backends(arguments))))),
        isa=isa,
        dtype=_dtype(arguments),
        quantization=str(getattr(arguments, "quantization", None) or ""),
        tp=tp,
        pp=pp,
        extra=tuple(extra),
    )


def _arguments() -> Any:
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:  # a host pool without a server, or another release
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
"""Per process: hooks are installed once, while storages may be attached and detached (`attach_hicache_storage`)."""


def watch_weights(changed: Callable[[], None]) -> None:
    """Calls the method `changed` after every update of this process's weights, even if the update failed.

    Uses SGLang's plugin hooks, because HiCache then flushes its radix tree and queues but does not notify storages.
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
                if (method := watcher()) is not None:
                    method()

    for name in ("disk", "distributed", "tensor", "ipc"):
        HookRegistry.register(f"{_UPDATER}.update_weights_from_{name}", around, HookType.AROUND)
    HookRegistry.apply_hooks()


class Text(NamedTuple):
    """The token prefix of a request or of a node in SGLang's radix tree.

    Attributes:
        tokens: from the start of the prompt up to the first placeholder of an image, uint32.
        salt: the request's `cache_salt`.
        extra: the request's `extra_key`, which also identifies its LoRA adapter.
    """

    tokens: npt.NDArray[np.uint32]
    salt: str
    extra: str


@runtime_checkable
class Listener(Protocol):
    """A linker that receives tokens through hooks, because SGLang's interface only passes page hashes."""

    def asking(self, text: Text, device_tokens: int, tree: Any) -> None:
        """Precedes a `lookup` of this text; its first `device_tokens` tokens are resident on the device."""

    def offering(self, text: Text, slots: torch.Tensor) -> None:
        """Precedes an `offload` of the end of this text; `slots` holds one device slot per token, from the first token on."""


_watching = False
"""Per process: hooks cannot be removed."""


def watch_tokens() -> None:
    """Installs hooks that pass the tokens of each lookup and offload to the linker of this process, if it is a `Listener`."""
    global _watching
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if _watching:
        return
    _watching = True
    inserting: list[Any] = []

    def match(plain: Any, link: Any, key: Any, req: Any, result: Any) -> Any:
        if isinstance(link.cache_linker, Listener):
            link.cache_linker.asking(_text(key), int(result.device_prefix_len), link.cache)
        return plain(link, key, req, result)

    def insert(plain: Any, tree: Any, params: Any) -> Any:
        inserting.append(params.key)
        try:
            return plain(tree, params)
        finally:
            inserting.pop()

    def offload(plain: Any, link: Any, node: Any, transfers: Any) -> Any:
        if inserting and isinstance(link.cache_linker, Listener):
            key, core = inserting[-1], link.cache.tree_core
            slots = core.collect_full_device_indices(node, link.cache.root_node_handle(key.extra_key))
            link.cache_linker.offering(_text(key, len(slots)), slots)
        return plain(link, node, transfers)

    HookRegistry.register(f"{_LINK}.match", match, HookType.AROUND)
    HookRegistry.register(f"{_TREE}.insert", insert, HookType.AROUND)
    HookRegistry.register(f"{_LINK}._offload_node", offload, HookType.AROUND)
    HookRegistry.apply_hooks()


def _text(key: Any, length: int | None = None) -> Text:
    """Returns the text of a `RadixKey`, or of its first `length` tokens."""
    tokens = np.asarray(key.raw_token_ids()[:length], dtype=np.int64)
    pictures = np.flatnonzero(tokens >= PICTURE)
    if len(pictures):
        tokens = tokens[: pictures[0]]
    return Text(tokens.astype(np.uint32), key.cache_salt or "", key.extra_key or "")


def check_linking(params: Any, components: Any) -> None:
    """Rejects configurations in which a prefix needs more than full attention's KV, or a rank does not hold it completely.

    Args:
        params: SGLang's `CacheInitParams`.
        components: what SGLang's tree keeps per node.

    Raises:
        UnsupportedError: with the component or option.
    """
    others = sorted(str(getattr(part, "name", part)) for part in components if getattr(part, "name", "") != "FULL")
    if others:
        raise UnsupportedError(f"the model keeps {', '.join(others)} besides full attention's KV; use HiCache for it")
    if params.attn_cp_size > 1:
        raise UnsupportedError("context parallelism (attn_cp_size) gives each rank a part of every page: not supported")
    if params.pp_size > 1:
        raise UnsupportedError("pipeline stages do not synchronise what a linker has loaded; use HiCache for them")
    if params.is_eagle or params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        raise UnsupportedError(
            "speculative decoding keeps a draft model's KV besides the model's own; use HiCache for it"
        )


def rank_of(params: Any) -> tuple[int, int]:
    """Returns this process's rank in the attention's tensor-parallel group, and the group's size."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if group is None or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)


def agreed(tree: Any, fine: bool) -> bool:
    """Returns whether `fine` is true on every rank (collective: all ranks must call it)."""
    verdict = torch.tensor([int(fine)], dtype=torch.int32)
    tree._all_reduce_attn_groups(verdict, torch.distributed.ReduceOp.MIN)
    return bool(verdict.item())
