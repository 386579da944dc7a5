"""Derives names from a vLLM request: everything about it that affects KV values, or the reason why it cannot be named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from blake3 import blake3

from lmcache.errors import LMCacheError
from lmcache.identity import file_stamps, model_identity
from lmcache.keys import Extra

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Unnamed(Exception):  # noqa: N818  # not an error
    """Raised for a request that runs uncached; `reason` is a slug for metrics."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


def salt_of(request: Request) -> str:
    """Returns the request's tenant."""
    return request.cache_salt or ""


class Loras:
    """The LoRAs of one engine, named by the content of their files when a request first used them.

    vLLM loads an adapter once and keeps it. If its files change afterwards, or its name or id comes to mean another adapter,
    what is in memory and in vLLM's own blocks is unknown: its requests run uncached.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, object], tuple[str, object]] = {}

    def name_of(self, request: Request) -> str:
        """The adapter's weights and scaling, by content; empty without one.

        Raises:
            Unnamed: they cannot be looked at, or are not those that were loaded.
        """
        lora = request.lora_request
        if lora is None:
            return ""
        path = getattr(lora, "lora_path", "") or getattr(lora, "path", "")
        if not path:
            raise Unnamed("lora", "the LoRA's weights cannot be named: it has no path")
        keys = [("path", path), ("id", getattr(lora, "lora_int_id", None)), ("name", getattr(lora, "lora_name", None))]
        try:
            stamps = file_stamps(path)
            known = {self._seen[key] for key in keys if key in self._seen}
            found = known.pop() if len(known) == 1 else None
            if known or (found is not None and found[1] != stamps):
                raise Unnamed("lora", f"the LoRA in {path} changed after it was first used; restart to cache it again")
            if found is None:
                form = " 3d" if getattr(lora, "is_3d_lora_weight", False) else ""
                found = model_identity(path) + form, stamps
                if file_stamps(path) != stamps:
                    raise Unnamed("lora", f"the LoRA in {path} changes while it is read")
        except (LMCacheError, OSError) as error:
            raise Unnamed("lora", f"the LoRA's weights cannot be named: {error}") from error
        self._seen |= {key: found for key in keys if key[1] is not None}
        return found[0]


def lora_of(request: Request) -> str:
    """As `Loras.name_of`, of an engine that has not seen the adapter before."""
    return Loras().name_of(request)


def extras_of(request: Request) -> tuple[Extra, ...]:
    """Images, audio and the like behind placeholder tokens, by their processed bytes.

    vLLM's identifiers are not used: they may come from the client (`multi_modal_uuids`) or from a counter.

    Raises:
        Unnamed: content that is not here, prompt embeddings, or a prompt that may still change.
    """
    if getattr(request, "resumable", False):
        raise Unnamed("resumable", "a streaming session may take tokens back after they were named")
    if getattr(request, "prompt_embeds", None) is not None:
        raise Unnamed("prompt_embeds", "prompt embeddings have no token ids to name them by")
    found = []
    for feature in request.mm_features:
        data = getattr(feature, "data", None)
        if not data or "address" in data:  # in vLLM's shared memory, of which the scheduler knows the address only
            raise Unnamed(
                "multimodal",
                f"the processed {feature.modality} is not here, and {feature.identifier!r} need not be a hash of its content",
            )
        digest = blake3(feature.modality.encode())
        for key in sorted(data):
            _feed(digest, key, getattr(data[key], "data", None))
        place = feature.mm_position
        _feed(digest, "is_embed", getattr(place, "is_embed", None))
        found.append(Extra(int(place.offset), int(place.length), digest.digest()))
    return tuple(found)


def _feed(digest: blake3, key: str, value: object) -> None:
    """Adds nested tensors and plain values, each behind its kind and size."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        head = f"{key} {raw.dtype} {tuple(raw.shape)}"
        body = raw.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        head, body = f"{key} list {len(value)}", b""
    else:
        head, body = f"{key} {type(value).__name__}", repr(value).encode()
    digest.update(len(head).to_bytes(8, "little") + head.encode() + len(body).to_bytes(8, "little") + body)
    if isinstance(value, (list, tuple)):
        for inner in value:
            _feed(digest, key, inner)
