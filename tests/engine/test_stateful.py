"""Random stores, lookups, retrieves, clears, restarts and damage over tenants, against a dictionary: never a wrong bit."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache import CacheEngine
from lmcache_conformance.kvlab import CHUNK, DIM, HEADS, KINDS, LAYERS, Pool, bits, scattered, tiny_config, tiny_spec

SALTS = st.sampled_from(["", "a", "b"])
# Prompts that share prefixes: each letter is a chunk of its own tokens.
PROMPTS = st.lists(st.sampled_from("xyz"), min_size=1, max_size=5)
TAILS = st.integers(0, CHUNK - 1)


def tokens_of(prompt: Sequence[str], tail: int = 0) -> list[int]:
    return [ord(letter) * 1000 + i for letter in prompt for i in range(CHUNK)] + [7] * tail


class CacheMachine(RuleBasedStateMachine):
    """The truth is a function: KV of a chunk = bits seeded by (salt, everything up to its end)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.spec = tiny_spec()
        self.held: set[tuple[str, tuple[str, ...]]] = set()  # names that may be served: stored and not cleared
        self.engine: CacheEngine | None = None
        self.hits: list[object] = []

    @initialize(disk=st.booleans(), room=st.integers(0, 12), order=st.sampled_from(["canonical", "native"]))
    def open(self, disk: bool, room: int, order: str) -> None:
        size = self.spec.object_bytes(0, CHUNK)
        where = {"disk_path": self.folder, "disk_order": order} if disk else {}
        self.config = tiny_config(dram_bytes=room * size, **where)
        self.disk = disk
        self.engine = CacheEngine(self.config, self.spec)

    def teardown(self) -> None:
        if self.engine is not None:
            self.engine.close()
        shutil.rmtree(self.folder)

    def truth(self, salt: str, prompt: Sequence[str], kind: str) -> tuple[Pool, torch.Tensor]:
        """A pool in which the KV of this prompt lies, each chunk's bits a function of salt and prefix."""
        pool = Pool(kind, 24, seed=1)
        slots = scattered(len(prompt) * CHUNK, pool, seed=2)
        for i in range(len(prompt)):
            seed = random.Random(f"{salt}|{''.join(prompt[: i + 1])}").randrange(1 << 30)
            content = bits((CHUNK, LAYERS, 2, HEADS, DIM), torch.bfloat16, seed)
            for slot, value in zip(slots[i * CHUNK : (i + 1) * CHUNK].tolist(), content, strict=True):
                pool.put(slot, value)
        return pool, slots

    @rule(salt=SALTS, prompt=PROMPTS, tail=TAILS, kind=st.sampled_from(KINDS))
    def store(self, salt: str, prompt: list[str], tail: int, kind: str) -> None:
        assert self.engine is not None
        pool, slots = self.truth(salt, prompt, kind)
        slots = torch.cat([slots, torch.full((tail,), -1)])
        accepted = self.engine.store(tokens_of(prompt, tail), pool.kv, slots, salt=salt)
        assert accepted % CHUNK == 0
        assert 0 <= accepted <= len(prompt) * CHUNK
        self.held |= {(salt, tuple(prompt[: i + 1])) for i in range(len(prompt))}
        with self.engine.lookup(tokens_of(prompt), salt=salt) as hit:
            assert hit.tokens >= accepted, "what was accepted is there"

    @rule(salt=SALTS, prompt=PROMPTS, tail=TAILS, kind=st.sampled_from(KINDS), layered=st.booleans())
    def retrieve(self, salt: str, prompt: list[str], tail: int, kind: str, layered: bool) -> None:
        assert self.engine is not None
        target = Pool(kind, 24, seed=77)
        slots = scattered(len(prompt) * CHUNK, target, seed=3)
        with self.engine.lookup(tokens_of(prompt, tail), salt=salt) as hit:
            assert hit.tokens == sum(hit.by_tier.values())
            for i in range(hit.tokens // CHUNK):
                assert (salt, tuple(prompt[: i + 1])) in self.held, "a hit on what was never stored, or was cleared"
            if layered:
                load = self.engine.retrieve_layers(hit, target.kv, slots)
                loaded = load.finish()
            else:
                loaded = self.engine.retrieve(hit, target.kv, slots)
        assert loaded <= hit.tokens
        truth, where = self.truth(salt, prompt, kind)
        assert target.sequence(slots[:loaded]) == truth.sequence(where[:loaded])

    @rule(salt=SALTS, prompt=PROMPTS)
    def lease_and_forget(self, salt: str, prompt: list[str]) -> None:
        """A request that was aborted: its lease stays until it is released much later."""
        assert self.engine is not None
        self.hits.append(self.engine.lookup(tokens_of(prompt), salt=salt))
        if len(self.hits) > 3:
            self.hits.pop(0).release()  # type: ignore[attr-defined]

    @rule(salt=SALTS, prompt=PROMPTS)
    def prefetch(self, salt: str, prompt: list[str]) -> None:
        assert self.engine is not None
        with self.engine.lookup(tokens_of(prompt), salt=salt) as hit:
            self.engine.prefetch(hit)

    @rule(salt=st.one_of(st.none(), SALTS))
    def clear(self, salt: str | None) -> None:
        assert self.engine is not None
        self.engine.clear(salt)
        self.held = {name for name in self.held if salt is not None and name[0] != salt}

    @precondition(lambda self: self.disk)
    @rule(flush=st.booleans())
    def restart(self, flush: bool) -> None:
        assert self.engine is not None
        if flush:
            assert self.engine.flush()
        self.hits.clear()
        self.engine.close()
        self.engine = CacheEngine(self.config, self.spec)

    @precondition(lambda self: self.disk)
    @rule(data=st.data(), damage=st.sampled_from(["truncate", "flip", "delete", "empty", "swap"]))
    def damage_a_file(self, data: st.DataObject, damage: str) -> None:
        assert self.engine is not None
        self.engine.flush()
        files = sorted(self.folder.rglob("*.safetensors"))
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1)) if content else 0
        if damage == "delete":
            file.unlink()
        elif damage == "swap":
            shutil.copyfile(file, data.draw(st.sampled_from(files)).with_suffix(".x"))
            other = data.draw(st.sampled_from(files))
            other.write_bytes(bytes(content))
        elif damage == "truncate":
            file.write_bytes(bytes(content[:at]))
        elif damage == "empty":
            file.write_bytes(b"")
        elif content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(bytes(content))

    @invariant()
    def the_index_is_sound(self) -> None:
        if self.engine is not None:
            self.engine._index.check()


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
test_the_cache_against_a_function = CacheMachine.TestCase
