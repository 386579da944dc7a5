"""Keys of objects: namespace, chain, object id. The same input gives the same key on every host and in every process.

    namespace = H("lmcache" ‖ version ‖ model ‖ geometry ‖ numerics ‖ salt ‖ LoRA ‖ weights version ‖ chunk_tokens
                  [‖ meaning])
    h_0       = H("chunk" ‖ namespace ‖ n ‖ tokens of chunk 0 as u32le ‖ extras_0)
    h_i       = H("chunk" ‖ h_(i−1)   ‖ n ‖ tokens of chunk i as u32le ‖ extras_i)

H is BLAKE3 with all 32 bytes kept. Every field of the namespace is preceded by its length, so that different lists of fields
never have the same encoding. `tests/core/vectors.json` freezes the formulas; changing one requires a new `NAMES_VERSION`.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from lmcache.errors import ConfigError, TokenError
from lmcache.identity import model_identity
from lmcache.plan import Chain, Name
from lmcache.spec import KVSpec, Rect

__all__ = [
    "NAMES_VERSION",
    "Chain",
    "Extra",
    "Name",
    "ObjectId",
    "TokenIds",
    "as_tokens",
    "chain_of",
    "chain_of_keys",
    "model_identity",
    "namespace_of",
    "scoped",
]

NAMES_VERSION = 1
"""Incremented when any formula here changes; objects of another version are never found."""

TokenArray = npt.NDArray[np.uint32]
"""Token ids as `as_tokens` returns them."""

TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[Any] | torch.Tensor | array.array[int]"
"""Any one-dimensional sequence of integers in [0, 2³²)."""

_MAX_TOKEN = 2**32 - 1


class ObjectId(NamedTuple):
    """The key of one object: the bytes of one chunk × one layer group × one rect.

    `chain` alone determines the values of a chunk (it covers the namespace and all tokens up to the end of the chunk).
    `namespace` and `depth` (index of the chunk in its chain) let a tier organize, list and clear objects without opening
    them.
    """

    namespace: bytes
    chain: bytes
    group: int
    rect: Rect
    tokens: int
    depth: int

    @classmethod
    def of(cls, name: Name, rect: Rect) -> ObjectId:
        """Returns the key that the rank with `rect` uses for the object called `name` in the index."""
        return cls(name.namespace, name.chain, name.group, rect, name.tokens, name.depth)


class Extra(NamedTuple):
    """Content that token ids do not identify: an image, audio clip or embedding behind placeholder tokens.

    Attributes:
        start: position of its first placeholder token in the sequence.
        length: number of tokens it spans, at least 1.
        digest: at least 16 bytes of a cryptographic digest of the content; a collision would return KV of the wrong image.
    """

    start: int
    length: int
    digest: bytes


def as_tokens(tokens: TokenIds) -> npt.NDArray[np.uint32]:
    """Converts token ids from any integer sequence, array or tensor to a contiguous little-endian uint32 array.

    Raises:
        TokenError: ids are negative, larger than 32 bits, not integers, or not one-dimensional.
    """
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, np.ndarray):
        return _checked(tokens)
    if isinstance(tokens, (bytes, bytearray, str)):
        raise TokenError(f"tokens must be integers, not {type(tokens).__name__}: pass the tokenizer's ids")
    try:
        flat = array.array("I", tokens)
    except OverflowError:
        bad = next(t for t in tokens if not 0 <= t <= _MAX_TOKEN)
        raise TokenError(f"token id {bad} is outside of [0, 2^32)") from None
    except TypeError as error:
        raise TokenError(f"tokens must be a flat sequence of integers: {error}") from None
    return np.frombuffer(flat, dtype=np.uint32).astype("<u4", copy=False)


def _checked(tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    if tokens.ndim != 1:
        raise TokenError(f"tokens must be one-dimensional, got shape {tokens.shape}: pass one sequence at a time")
    if tokens.dtype.kind not in "iu":
        raise TokenError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.size and tokens.dtype.kind == "i" and (low := int(tokens.min())) < 0:
        raise TokenError(f"token id {low} is negative: remove padding or placeholder ids first")
    if tokens.size and tokens.dtype.itemsize > 4 and (high := int(tokens.max())) > _MAX_TOKEN:
        raise TokenError(f"token id {high} is outside of [0, 2^32)")
    return np.ascontiguousarray(tokens, dtype="<u4")


def namespace_of(
    spec: KVSpec,
    *,
    chunk_tokens: int,
    salt: str = "",
    lora: str = "",
    weights_version: str = "",
    share: Literal["exact", "semantic"] = "exact",
) -> bytes:
    """Returns the 32-byte namespace: a digest of everything besides the tokens that determines KV values.

    Rects are not included: chains are rank-independent. `share="semantic"` omits the numerics (rounding), and nothing else, so
    that another engine's KV for the same model can be used (which is never bit-exact, see the docs).

    Args:
        spec: source of model identity, group geometry, numerics and meaning; an empty meaning is not encoded.
        chunk_tokens: tokens per chunk.
        salt: separates tenants.
        lora: content digest of the active LoRA adapter; empty without one.
        weights_version: version of the weights if they change under one name.
        share: see above.
    """
    if share not in ("exact", "semantic"):
        raise ConfigError(f"share must be 'exact' or 'semantic', not {share!r}")
    digest = blake3()
    for field in (
        b"lmcache",
        NAMES_VERSION.to_bytes(4, "little"),
        spec.model.encode(),
        msgspec.json.encode(
            [(g.layers, g.planes, g.kv_heads, g.rule) for g in spec.groups]
        ),  # without the group's name, which is only a label
        msgspec.json.encode(spec.numerics) if share == "exact" else b"semantic",
        salt.encode("utf-8", "surrogatepass"),
        lora.encode("utf-8", "surrogatepass"),
        weights_version.encode("utf-8", "surrogatepass"),
        chunk_tokens.to_bytes(8, "little"),
        *([spec.meaning.encode()] if spec.meaning else []),
    ):
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def chain_of(
    namespace: bytes, tokens: npt.NDArray[np.uint32], chunk_tokens: int, extras: Sequence[Extra] = ()
) -> Chain:
    """Returns the digest of every full chunk of `tokens`; a tail of fewer than `chunk_tokens` tokens has none.

    Takes about 1.9 µs per 256-token chunk; no per-token Python. `tokens` is a result of `as_tokens`.
    """
    raw = tokens.data.cast("B")
    step = chunk_tokens * 4
    count = chunk_tokens.to_bytes(4, "little")
    head = b"chunk"
    digest = namespace
    digests: list[bytes] = []
    add = digests.append
    if not extras:
        for start in range(0, len(raw) - step + 1, step):
            digest = blake3(head + digest + count + raw[start : start + step]).digest()
            add(digest)
        return Chain(namespace, digests)
    _check_extras(extras)
    for depth, start in enumerate(range(0, len(raw) - step + 1, step)):
        seen = _encode_extras(extras, depth * chunk_tokens, chunk_tokens)
        digest = blake3(head + digest + count + raw[start : start + step] + seen).digest()
        add(digest)
    return Chain(namespace, digests)


def chain_of_keys(namespace: bytes, keys: Sequence[str | bytes]) -> Chain:
    """Returns digests for an engine with its own keys (page hashes): `H("key" ‖ namespace ‖ key)`, independent of each other.

    The engine's keys must cover everything besides the namespace that determines the values: the tokens and all before them.
    """
    digests = []
    for key in keys:
        raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
        if not raw:
            raise TokenError("a key is empty: every object needs a unique key")
        digests.append(blake3(b"key" + namespace + raw).digest())
    return Chain(namespace, digests, linked=False)


def scoped(namespace: bytes, scope: str) -> bytes:
    """Returns a sub-namespace of `namespace`, for keys that are built by other rules than ours."""
    return blake3(b"scope" + namespace + scope.encode("utf-8", "surrogatepass")).digest()


def _check_extras(extras: Sequence[Extra]) -> None:
    for extra in extras:
        if extra.start < 0 or extra.length < 1:
            raise TokenError(f"an extra must start at 0 or later and span at least 1 token, got {extra}")
        if len(extra.digest) < 16:
            raise TokenError(
                f"an extra's digest has {len(extra.digest)} bytes; at least 16 are needed, as short hashes collide"
            )


def _encode_extras(extras: Sequence[Extra], start: int, length: int) -> bytes:
    """Encodes the extras that overlap tokens [start, start + length), each with its offset relative to `start`."""
    found = sorted(e for e in extras if e.start < start + length and start < e.start + e.length)
    return b"".join(
        b"extra"
        + (e.start - start).to_bytes(8, "little", signed=True)
        + e.length.to_bytes(8, "little")
        + len(e.digest).to_bytes(4, "little")
        + e.digest
        for e in found
    )
