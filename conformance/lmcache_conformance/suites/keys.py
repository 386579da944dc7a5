"""The contract of keys: whatever changes KV values changes the key, and nothing else does.

Subclass `KeyTests` and override `namespace`, `chain` or `object_id` with your adapter's functions, if it has its own. The
tests do not depend on how a key is computed.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lmcache.errors import TokenError
from lmcache.keys import Extra, Name, ObjectId, as_tokens, chain_of, namespace_of
from lmcache.spec import HitRule, KVSpec, LayerGroup, Numerics, Plane, Rect, trailing
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.alike import ALIKE
from lmcache_conformance.labs.fresh_interpreter import in_new_process
from lmcache_conformance.runner.marks import level, requires

CHUNK = 16
SPEC = KVSpec.uniform(
    "org/model@abc",
    layers=4,
    kv_heads=4,
    head_dim=64,
    dtype=torch.bfloat16,
    numerics=Numerics(engine="e", engine_version="1", attention_backend="sdpa", isa="x", dtype="bfloat16"),
)


class KeyCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a key scheme supports.

    Attributes:
        images: keys cover the digests of images and other multi-modal inputs.
        semantic: `share="semantic"` leaves the numerics out of the key.
    """

    images: bool = True
    semantic: bool = True


class KeyTests:
    """The contract of keys."""

    capabilities: KeyCapabilities = KeyCapabilities()

    def namespace(
        self,
        spec: KVSpec,
        *,
        chunk_tokens: int = CHUNK,
        salt: str = "",
        lora: str = "",
        weights_version: str = "",
        share: str = "exact",
    ) -> bytes:
        """Returns the digest of everything except the tokens that determines KV values."""
        return namespace_of(
            spec,
            chunk_tokens=chunk_tokens,
            salt=salt,
            lora=lora,
            weights_version=weights_version,
            share=share,  # type: ignore[arg-type]
        )

    def chain(
        self, namespace: bytes, tokens: Any, chunk_tokens: int = CHUNK, extras: Sequence[Extra] = ()
    ) -> Sequence[bytes]:
        """Returns one digest per whole chunk of `tokens`, which may be of any integer type."""
        return chain_of(namespace, as_tokens(tokens), chunk_tokens, extras).digests

    def object_id(self, name: Name, rect: Rect) -> ObjectId:
        """Returns the object id of the part of a chunk that the rank with `rect` holds."""
        return ObjectId.of(name, rect)

    # ---------------------------------------------------------------- what the key covers

    @level(Level.KEYS)
    @pytest.mark.parametrize("what", ["salt", "lora", "weights_version"])
    def test_tenant_lora_and_weights_change_the_key(self, what: str) -> None:
        values = ["", "a", "b", "A", "a ", "a" * 100, "a" * 99 + "b", "\0", *ALIKE]
        names = {self.namespace(SPEC, **{what: value}) for value in values}  # type: ignore[arg-type]
        assert len(names) == len(values), f"{what} is not, or not entirely, part of the key"

    @level(Level.KEYS)
    def test_fields_do_not_flow_into_each_other(self) -> None:
        names = [
            self.namespace(SPEC, salt="ab"),
            self.namespace(SPEC, salt="a", lora="b"),
            self.namespace(SPEC, lora="ab"),
            self.namespace(SPEC, lora="a", weights_version="b"),
            self.namespace(SPEC, weights_version="ab"),
            self.namespace(SPEC, salt="a\0", lora="b"),
            self.namespace(SPEC, salt="a", lora="\0b"),
        ]
        assert len(set(names)) == len(names), "two different sets of fields have the same key"

    @level(Level.KEYS)
    @pytest.mark.parametrize(
        "what", ["model", "dtype", "fp8", "head_dim", "kv_heads", "layers", "planes", "rule", "chunk"]
    )
    def test_the_format_of_the_kv_changes_the_key(self, what: str) -> None:
        def group(**change: Any) -> KVSpec:
            return msgspec.structs.replace(SPEC, groups=(msgspec.structs.replace(SPEC.groups[0], **change),))

        def planes(dtype: str, elems: int = 64) -> tuple[Plane, ...]:
            return (Plane("k", dtype, elems), Plane("v", dtype, elems))

        variants: Mapping[str, Callable[[], Sequence[bytes]]] = {
            "model": lambda: [self.namespace(msgspec.structs.replace(SPEC, model="org/model@abd"))],
            "dtype": lambda: [self.namespace(group(planes=planes(d))) for d in ("float16", "float32")],
            "fp8": lambda: [self.namespace(group(planes=planes(d))) for d in ("float8_e4m3fn", "float8_e5m2", "uint8")],
            "head_dim": lambda: [self.namespace(group(planes=planes("bfloat16", n))) for n in (32, 128)],
            "kv_heads": lambda: [self.namespace(group(kv_heads=n)) for n in (1, 2, 8)],
            "layers": lambda: [self.namespace(group(layers=(0, 1, 2)))],
            "planes": lambda: [self.namespace(group(planes=(Plane("latent", "bfloat16", 128),)))],
            "rule": lambda: [
                self.namespace(group(rule=rule)) for rule in (trailing(7), trailing(8), HitRule("state_at"))
            ],
            "chunk": lambda: [self.namespace(SPEC, chunk_tokens=n) for n in (8, 32)],
        }
        names = [self.namespace(SPEC), *variants[what]()]
        assert len(set(names)) == len(names), f"{what} is not part of the key"

    @level(Level.KEYS)
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("engine", "f"),
            ("engine_version", "2"),
            ("attention_backend", "eager"),
            ("isa", "y"),
            ("dtype", "float16"),
            ("quantization", "awq"),
            ("tp", 2),
            ("pp", 2),
            ("extra", (("threads", "2"),)),
        ],
    )
    def test_numerics_change_the_key(self, field: str, value: Any) -> None:
        other = msgspec.structs.replace(SPEC, numerics=msgspec.structs.replace(SPEC.numerics, **{field: value}))
        assert self.namespace(other) != self.namespace(SPEC), f"numerics.{field} is not part of the key"

    @level(Level.KEYS)
    @requires("semantic")
    def test_semantic_sharing_ignores_the_numerics_and_nothing_else(self) -> None:
        other = msgspec.structs.replace(SPEC, numerics=Numerics(engine="another", tp=4))
        assert self.namespace(other, share="semantic") == self.namespace(SPEC, share="semantic")
        assert self.namespace(SPEC, share="semantic") != self.namespace(SPEC)
        for change in ({"salt": "a"}, {"lora": "a"}, {"weights_version": "a"}, {"chunk_tokens": 8}):
            assert self.namespace(SPEC, share="semantic", **change) != self.namespace(SPEC, share="semantic")

    @level(Level.KEYS)
    def test_each_ranks_part_has_its_own_id(self) -> None:
        """Tensor, pipeline and context parallel ranks hold different bytes of the same chunk."""
        chain = self.chain(self.namespace(SPEC), range(CHUNK))
        name = Name(self.namespace(SPEC), chain[0], 0, CHUNK, 0)
        rects = [SPEC.shard(tp_rank=rank, tp_size=4).rects[0] for rank in range(4)]
        rects += [SPEC.shard(tp_rank=rank, tp_size=2).rects[0] for rank in range(2)]
        rects += [SPEC.shard(layers=layers).rects[0] for layers in ((0, 2), (2, 4))]
        rects.append(SPEC.rects[0])
        ids = {self.object_id(name, rect) for rect in rects}
        assert len(ids) == len(rects), "the parts of two ranks have the same id"
        groups = {self.object_id(name._replace(group=group), SPEC.rects[0]) for group in range(3)}
        assert len(groups) == 3, "the parts of two layer groups have the same id"

    @level(Level.KEYS)
    def test_ranks_agree_about_the_chain(self) -> None:
        names = {self.namespace(SPEC.shard(tp_rank=rank, tp_size=2)) for rank in range(2)}
        assert names == {self.namespace(SPEC)}, "ranks of one model compute different keys"

    # ---------------------------------------------------------------- tokens

    @level(Level.KEYS)
    def test_a_digest_covers_every_token_up_to_its_end_and_none_after(self) -> None:
        tokens = list(range(1000, 1000 + 5 * CHUNK + 3))
        plain = self.chain(self.namespace(SPEC), tokens)
        assert len(plain) == 5, "there must be one digest per whole chunk, and none for the tail"
        assert len(set(plain)) == 5
        for at in range(len(tokens)):
            changed = list(tokens)
            changed[at] ^= 1
            other = self.chain(self.namespace(SPEC), changed)
            first = at // CHUNK
            assert list(other[:first]) == list(plain[:first]), f"token {at} changes the digests of chunks before it"
            assert not set(other[first:]) & set(plain[first:]), f"token {at} is not covered by every digest after it"

    @level(Level.KEYS)
    def test_keys_depend_on_the_whole_prefix_and_its_order(self) -> None:
        name = self.namespace(SPEC)
        first, second = list(range(CHUNK)), list(range(500, 500 + CHUNK))
        forth, back = self.chain(name, first + second), self.chain(name, second + first)
        assert not set(forth) & set(back), "a chunk has the same digest after another prefix"
        assert not set(self.chain(name, first * 3)[1:]) & set(self.chain(name, first)), (
            "a repeated chunk has the same digest as its first occurrence"
        )
        assert list(self.chain(name, first + second)[:1]) == list(self.chain(name, first))

    @level(Level.KEYS)
    def test_large_token_ids_are_distinguished(self) -> None:
        name = self.namespace(SPEC)
        ids = [0, 1, 255, 256, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
        assert len({self.chain(name, [token] * CHUNK)[0] for token in ids}) == len(ids)

    @level(Level.KEYS)
    def test_the_namespace_decides_every_digest(self) -> None:
        tokens = list(range(3 * CHUNK))
        one, other = (self.chain(self.namespace(SPEC, salt=salt), tokens) for salt in ("a", "b"))
        assert not set(one) & set(other), "another tenant's chunks have the same digests"

    @level(Level.KEYS)
    def test_every_kind_of_integers_gives_the_same_keys(self) -> None:
        tokens = list(range(40))
        wanted = list(self.chain(self.namespace(SPEC), tokens))
        forms: Mapping[str, Any] = {
            "tuple": tuple(tokens),
            "range": range(40),
            "int64 array": np.array(tokens),
            "uint16 array": np.array(tokens, dtype=np.uint16),
            "big-endian array": np.array(tokens, dtype=">i4"),
            "strided array": np.repeat(np.array(tokens), 2)[::2],
            "int64 tensor": torch.tensor(tokens),
            "int32 tensor": torch.tensor(tokens, dtype=torch.int32),
            "array.array": array.array("q", tokens),
            "numpy integers": [np.int64(token) for token in tokens],
        }
        for form, value in forms.items():
            assert list(self.chain(self.namespace(SPEC), value)) == wanted, f"{form}: other digests than for a list"

    @level(Level.KEYS)
    @pytest.mark.parametrize("bad", [[1, -1], [2**32], [1.5], "text", [[1]], [None]], ids=str)
    def test_invalid_token_ids_are_refused(self, bad: Any) -> None:
        try:
            got = self.chain(self.namespace(SPEC), bad)
        except TokenError:
            return
        raise AssertionError(f"{bad!r} was accepted as token ids: {got}")

    # ---------------------------------------------------------------- images

    @level(Level.KEYS)
    @requires("images")
    def test_every_byte_of_an_images_digest_counts(self) -> None:
        tokens = list(range(2 * CHUNK))
        name = self.namespace(SPEC)
        digest = bytes(range(100, 132))
        seen = {tuple(self.chain(name, tokens, extras=[Extra(3, 4, digest)]))}
        for at in range(len(digest)):
            other = digest[:at] + bytes([digest[at] ^ 1]) + digest[at + 1 :]
            seen.add(tuple(self.chain(name, tokens, extras=[Extra(3, 4, other)])))
        assert len(seen) == 1 + len(digest), (
            f"{33 - len(seen)} of 32 bytes of an image's digest are not part of the key"
        )

    @level(Level.KEYS)
    @requires("images")
    def test_an_image_changes_the_digests_from_its_position_on(self) -> None:
        tokens, name = list(range(4 * CHUNK)), self.namespace(SPEC)
        at = CHUNK + 4
        plain = list(self.chain(name, tokens))
        variants = {
            "an image": [Extra(at, 4, b"a" * 32)],
            "another image": [Extra(at, 4, b"b" * 32)],
            "elsewhere": [Extra(at + 1, 4, b"a" * 32)],
            "longer": [Extra(at, 40, b"a" * 32)],
            "twice": [Extra(at, 4, b"a" * 32), Extra(at + 6, 4, b"a" * 32)],
        }
        chains = {what: list(self.chain(name, tokens, extras=extras)) for what, extras in variants.items()}
        for what, chain in chains.items():
            assert chain[:1] == plain[:1], f"{what}: the digests before the image changed"
            assert not set(chain[1:]) & set(plain[1:]), f"{what}: the image does not change the digests after it"
        last = {chain[-1] for chain in chains.values()}
        assert len(last) == len(chains), "two different uses of images have the same digest"

    @level(Level.KEYS)
    @requires("images")
    def test_short_digests_are_refused(self) -> None:
        for digest in (b"", b"\1\2", b"\0" * 8):
            try:
                self.chain(self.namespace(SPEC), range(CHUNK), extras=[Extra(0, 4, digest)])
            except TokenError:
                continue
            raise AssertionError(f"a digest of {len(digest)} bytes was accepted; short hashes collide")

    # ---------------------------------------------------------------- other processes

    @level(Level.KEYS)
    def test_keys_are_the_same_in_another_process(self) -> None:
        """The other process has another hash seed, other addresses and another start time."""
        here = self.names()
        assert self.names() == here, "keys differ between two calls in one process"
        there = in_new_process(self, "names")
        wrong = [case for case in here if there.get(case) != here[case]]
        assert not wrong, f"another process computes other keys for: {', '.join(wrong)}"

    def names(self) -> dict[str, list[str]]:
        """Returns keys of many cases, by case. Runs in this process and in another one."""
        planes = (Plane("k", "float16", 32), Plane("v", "float16", 32))
        groups = (LayerGroup("full", (0, 2), planes, 2), LayerGroup("sliding", (1, 3), planes, 2, trailing(511)))
        hybrid = KVSpec.of_groups("hybrid", groups, Numerics(engine="e"))
        tokens = list(range(3 * CHUNK))
        name = self.namespace(SPEC)
        spaces = {
            "plain": name,
            "salt": self.namespace(SPEC, salt="tenant"),
            "lora": self.namespace(SPEC, lora="digest"),
            "weights": self.namespace(SPEC, weights_version="7"),
            "hybrid": self.namespace(hybrid),
        }
        chains = {case: [space.hex(), *(d.hex() for d in self.chain(space, tokens))] for case, space in spaces.items()}
        if self.capabilities.images:
            extras = [Extra(5, 3, b"i" * 32), Extra(20, 20, b"j" * 16)]
            chains["images"] = [digest.hex() for digest in self.chain(name, tokens, extras=extras)]
        return chains
