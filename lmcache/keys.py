"""Names: namespace, chain, object id, model identity. The same input gives the same name on every host, in every process.

    namespace = H(format version, model identity, spec geometry, numerics, salt, LoRA digest, chunk_tokens, epoch)
    h_0       = H("chunk" ‖ namespace ‖ n ‖ tokens of chunk 0 as u32le ‖ extras_0)
    h_i       = H("chunk" ‖ h_(i−1)   ‖ n ‖ tokens of chunk i as u32le ‖ extras_i)

H is BLAKE3, all 32 bytes kept. A name never changes silently: `tests/core/vectors.json` freezes it, and a change of the
formula bumps `NAMES_VERSION`.
"""

from __future__ import annotations

from typing import NamedTuple

from lmcache.spec import Rect


class ObjectId(NamedTuple):
    """The name of one object: the bytes of one chunk × one layer group × one rect.

    `chain` alone decides the values (it covers the namespace and all tokens up to the chunk's end); `namespace` and
    `depth` (index of the chunk in its chain) ride along so that a tier can file, list and clear objects without opening
    them.
    """

    namespace: bytes
    chain: bytes
    group: int
    rect: Rect
    tokens: int
    depth: int
