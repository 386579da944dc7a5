"""Derives names from a vLLM request: everything about it that affects KV values, or the reason why it cannot be named."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

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


class _Adapter:
    """One LoRA: its name, the stamps of its files when it was named, and whether vLLM is known to have loaded just these."""

    __slots__ = ("loaded", "name", "stamps")

    def __init__(self, name: str, stamps: object) -> None:
        self.name = name
        self.stamps = stamps
        self.loaded = False


class Loras:
    """The LoRAs of one engine, named by the content of their files, while vLLM can only have loaded just these.

    vLLM loads an adapter once and keeps it: before its first request (`add_lora`), or in the step that first needs it. What is
    in memory has the name if the files are the same before and after that. If they change later, or the adapter's path, name or
    id comes to mean another one, what is in memory and in vLLM's own blocks is unknown: its requests run uncached from then on.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, object], _Adapter] = {}
        self._unknown: set[tuple[str, object]] = set()

    def name_of(self, request: Request) -> str:
        """The adapter's weights and scaling, by content; empty without one.

        Raises:
            Unnamed: they cannot be looked at, or are not those that were loaded.
        """
        lora = request.lora_request
        if lora is None:
            return ""
        if getattr(lora, "load_inplace", False):
            self._give_up(lora)
            raise Unnamed("lora", f"the LoRA {_path(lora)} is loaded anew in every step (load_inplace)")
        return self._find(lora).name

    def is_loaded(self, request: Request) -> bool:
        """Whether vLLM has loaded the request's adapter, from the files that name it."""
        try:
            return request.lora_request is None or self._find(request.lora_request).loaded
        except Unnamed:
            return False

    def used(self, request: Request) -> None:
        """Takes note that vLLM has computed with the request's adapter: it is loaded. Its files must still be the same."""
        with contextlib.suppress(Unnamed):
            if request.lora_request is not None:
                self._find(request.lora_request).loaded = True

    def loading(self, lora: Any) -> None:
        """Names an adapter that vLLM is about to load, also in place of one of the same id."""
        with contextlib.suppress(Unnamed):
            self._find(lora)

    def loaded(self, lora: Any) -> None:
        """Takes note that vLLM has loaded it."""
        with contextlib.suppress(Unnamed):
            self._find(lora).loaded = True

    def _find(self, lora: Any) -> _Adapter:
        path, keys = _path(lora), _keys(lora)
        if not path:
            raise Unnamed("lora", "the LoRA's weights cannot be named: it has no path")
        try:
            stamps = file_stamps(path)
            known = {self._seen[key] for key in keys if key in self._seen}
            if self._unknown.intersection(keys) or len(known) > 1 or any(found.stamps != stamps for found in known):
                self._give_up(lora)
                raise Unnamed("lora", f"the LoRA in {path} changed after it was first used; restart to cache it again")
            if known:
                found = known.pop()
            else:
                form = " 3d" if getattr(lora, "is_3d_lora_weight", False) else ""
                found = _Adapter(model_identity(path) + form, stamps)
                if file_stamps(path) != stamps:
                    raise Unnamed("lora", f"the LoRA in {path} changes while it is read")
        except (LMCacheError, OSError) as error:
            self._give_up(lora)
            raise Unnamed("lora", f"the LoRA's weights cannot be named: {error}") from error
        self._seen |= dict.fromkeys(keys, found)
        return found

    def _give_up(self, lora: Any) -> None:
        """Names nothing any more by what is known of this adapter: a link that is turned back gives the first stamps again."""
        self._unknown.update(key for key in _keys(lora) if key in self._seen)


def _path(lora: Any) -> str:
    return getattr(lora, "lora_path", "") or getattr(lora, "path", "")


def _keys(lora: Any) -> list[tuple[str, object]]:
    keys = [
        ("path", _path(lora)),
        ("id", getattr(lora, "lora_int_id", None)),
        ("name", getattr(lora, "lora_name", None)),
    ]
    return [key for key in keys if key[1] is not None]


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
