"""Derives names from a vLLM request: everything about it that affects KV values, or the reason why it cannot be named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blake3 import blake3

from lmcache.errors import LMCacheError
from lmcache.identity import model_identity
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


def lora_of(request: Request) -> str:
    """Returns the identity of the LoRA's weights, by content; empty without a LoRA.

    Raises:
        Unnamed: the weights cannot be read.
    """
    lora = request.lora_request
    if lora is None:
        return ""
    path = getattr(lora, "lora_path", "") or getattr(lora, "path", "")
    try:
        return model_identity(path) if path else _no_lora("it has no path")
    except (LMCacheError, OSError) as error:
        return _no_lora(str(error))


def _no_lora(why: str) -> str:
    raise Unnamed("lora", f"the LoRA's weights cannot be named: {why}")


def extras_of(request: Request) -> tuple[Extra, ...]:
    """Returns images, audio and other content behind placeholder tokens, named by vLLM's full content hash.

    Raises:
        Unnamed: content without a hash, prompt embeddings, or a prompt that may still change.
    """
    if getattr(request, "resumable", False):
        raise Unnamed("resumable", "a streaming session may take tokens back after they were named")
    if getattr(request, "prompt_embeds", None) is not None:
        raise Unnamed("prompt_embeds", "prompt embeddings have no token ids to name them by")
    found = []
    for feature in request.mm_features:
        if not feature.identifier:
            raise Unnamed("multimodal", f"a {feature.modality} came without a content hash")
        place = feature.mm_position
        digest = blake3(f"{feature.modality}\0{feature.identifier}".encode()).digest()
        found.append(Extra(int(place.offset), int(place.length), digest))
    return tuple(found)
