"""Random histories of whole caches: several caches on one folder, tenants, restarts, damage, clears.

The expected KV of a chunk is a function: bits seeded by (salt, all tokens up to its end). Any hit of any cache can therefore
be checked bit for bit, and a model of what was stored and cleared tells whether there may be a hit at all.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache import CacheEngine, Config
from lmcache.engine import Hit
from lmcache.spec import KVSpec
from lmcache.tiers.base import clear_epoch
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.kv_pool import (
    CHUNK,
    DIM,
    HEADS,
    KINDS,
    LAYERS,
    Pool,
    bits,
    scattered,
    tiny_config,
    tiny_spec,
)
from lmcache_conformance.labs.scratch import make_scratch_folder
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.cache_factory import CacheFactory
from lmcache_conformance.suites.tier_machine import run_machine

Name = tuple[str, tuple[str, ...]]
"""A chunk's identity: salt, and the letters of the prompt up to its end."""

SALTS = st.sampled_from(["", "a", "b"])
PROMPTS = st.lists(st.sampled_from("xyz"), min_size=1, max_size=5)
"""Prompts that share prefixes: each letter stands for one chunk of tokens."""
TAILS = st.integers(0, CHUNK - 1)
SESSIONS = st.integers(0, 1)
_NOTICE_S = 60.0
"""Seconds in which a cache must notice that another process has cleared its folder; it takes a quarter of one."""
DAMAGE = st.sampled_from(["truncate", "flip", "delete", "empty", "swap"])


def tokens_of(prompt: Sequence[str], tail: int = 0) -> list[int]:
    """Returns the token ids of a prompt, followed by `tail` more that do not fill a chunk."""
    return [ord(letter) * 1000 + i for letter in prompt for i in range(CHUNK)] + [7] * tail


def chunks_of(salt: str, prompt: Sequence[str]) -> list[Name]:
    """Returns the identities of a prompt's chunks."""
    return [(salt, tuple(prompt[: i + 1])) for i in range(len(prompt))]


class CacheMachine(RuleBasedStateMachine):
    """Two caches on one folder (or one cache without a disk), and a model of what they may serve.

    Args:
        open_cache: opens a cache.
    """

    def __init__(self, open_cache: Callable[[Config, KVSpec], CacheEngine]) -> None:
        super().__init__()
        self.open_cache = open_cache
        self.folder = make_scratch_folder("lmcache-histories-")
        self.spec = tiny_spec()
        self.caches: list[CacheEngine] = []
        self.own: list[set[Name]] = []  # what each cache may hold in DRAM
        self.shared: set[Name] = set()  # what may be on disk
        self.hits: list[Hit] = []

    @initialize(disk=st.booleans(), room=st.integers(0, 12), order=st.sampled_from(["canonical", "native"]))
    def open(self, disk: bool, room: int, order: str) -> None:
        size = self.spec.object_bytes(0, CHUNK)
        where = {"disk_path": self.folder, "disk_order": order} if disk else {}
        self.config = tiny_config(dram_bytes=room * size, **where)
        self.disk = disk
        self.caches = [self.open_cache(self.config, self.spec) for _ in range(2 if disk else 1)]
        self.own = [set() for _ in self.caches]

    def teardown(self) -> None:
        for cache in self.caches:
            cache.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def truth(self, salt: str, prompt: Sequence[str], kind: str) -> tuple[Pool, torch.Tensor]:
        """Returns a pool that holds the expected KV of this prompt, and its slot mapping."""
        pool = Pool(kind, 24, seed=1)
        slots = scattered(len(prompt) * CHUNK, pool, seed=2)
        for i in range(len(prompt)):
            seed = random.Random(f"{salt}|{''.join(prompt[: i + 1])}").randrange(1 << 30)
            content = bits((CHUNK, LAYERS, 2, HEADS, DIM), torch.bfloat16, seed)
            for slot, value in zip(slots[i * CHUNK : (i + 1) * CHUNK].tolist(), content, strict=True):
                pool.put(slot, value)
        return pool, slots

    @rule(session=SESSIONS, salt=SALTS, prompt=PROMPTS, tail=TAILS, kind=st.sampled_from(KINDS))
    def store(self, session: int, salt: str, prompt: list[str], tail: int, kind: str) -> None:
        at = session % len(self.caches)
        pool, slots = self.truth(salt, prompt, kind)
        slots = torch.cat([slots, torch.full((tail,), -1)])
        accepted = self.caches[at].store(tokens_of(prompt, tail), pool.kv, slots, salt=salt)
        assert accepted % CHUNK == 0
        assert 0 <= accepted <= len(prompt) * CHUNK
        self.own[at].update(chunks_of(salt, prompt))
        if self.disk:
            self.shared.update(chunks_of(salt, prompt))
        with self.caches[at].lookup(tokens_of(prompt), salt=salt) as hit:
            assert hit.tokens >= accepted, "accepted tokens are not found"

    @rule(
        session=SESSIONS,
        salt=SALTS,
        prompt=PROMPTS,
        tail=TAILS,
        kind=st.sampled_from(KINDS),
    )
    def retrieve(self, session: int, salt: str, prompt: list[str], tail: int, kind: str) -> None:
        at = session % len(self.caches)
        cache = self.caches[at]
        target = Pool(kind, 24, seed=77)
        slots = scattered(len(prompt) * CHUNK, target, seed=3)
        with cache.lookup(tokens_of(prompt, tail), salt=salt) as hit:
            assert hit.tokens == sum(hit.by_tier.values())
            names = chunks_of(salt, prompt)
            held = [name in self.own[at] or name in self.shared for name in names]
            loaded = cache.retrieve(hit, target.kv, slots)
        assert loaded <= hit.tokens
        # Only loaded chunks are judged: a lookup may still count a file that another cache has cleared; its load then misses.
        served = loaded // CHUNK
        wrong = [name for name, there in zip(names[:served], held[:served], strict=True) if not there]
        assert not wrong, f"served {wrong}: never stored, or cleared"
        self.own[at].update(name for name, there in zip(names, held, strict=True) if there)
        truth, where = self.truth(salt, prompt, kind)
        assert target.sequence(slots[:loaded]) == truth.sequence(where[:loaded]), "wrong bits were loaded"

    @rule(session=SESSIONS, salt=SALTS, prompt=PROMPTS)
    def lease_and_forget(self, session: int, salt: str, prompt: list[str]) -> None:
        """An aborted request: its lease is kept and released much later."""
        self.hits.append(self.caches[session % len(self.caches)].lookup(tokens_of(prompt), salt=salt))
        if len(self.hits) > 3:
            self.hits.pop(0).release()

    @rule(session=SESSIONS, salt=SALTS, prompt=PROMPTS)
    def prefetch(self, session: int, salt: str, prompt: list[str]) -> None:
        at = session % len(self.caches)
        with self.caches[at].lookup(tokens_of(prompt), salt=salt) as hit:
            self.caches[at].prefetch(hit)
            found = chunks_of(salt, prompt)[: hit.tokens // CHUNK]
            self.own[at].update(name for name in found if name in self.shared)

    @rule(session=SESSIONS, salt=st.one_of(st.none(), SALTS))
    def clear(self, session: int, salt: str | None) -> None:
        """Clears one cache and the disk; the other cache drops the same from DRAM once it has noticed."""
        for cache in self.caches:
            assert cache.flush()
        at = session % len(self.caches)
        self.caches[at].clear(salt)
        self._wait_for_notice()
        for names in (*self.own, self.shared):
            names.intersection_update({name for name in names if salt is not None and name[0] != salt})

    def _wait_for_notice(self) -> None:
        """Waits until every cache knows of all clears of the folder, and has dropped what they removed."""
        tiers = [tier for cache in self.caches for tier in cache._rank.tiers]
        until = time.monotonic() + _NOTICE_S
        for cache in self.caches:
            cache.flush()  # looks at the folder
        while len({clear_epoch(tier) for tier in tiers}) > 1:
            assert time.monotonic() < until, "a clear is not noticed"
            time.sleep(0.01)
        for cache in self.caches:
            cache.flush()  # drops what was cleared, and says so

    @rule(session=SESSIONS, flush=st.booleans())
    def restart(self, session: int, flush: bool) -> None:
        at = session % len(self.caches)
        if flush:
            assert self.caches[at].flush()
        self.hits.clear()
        self.caches[at].close()
        self.caches[at] = self.open_cache(self.config, self.spec)
        self.own[at] = set()

    @precondition(lambda self: self.disk)
    @rule(data=st.data(), damage=DAMAGE)
    def damage_a_file(self, data: st.DataObject, damage: str) -> None:
        for cache in self.caches:
            cache.flush()
        files = sorted(self.folder.rglob("*.safetensors"))
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1)) if content else 0
        if damage == "delete":
            file.unlink()
        elif damage == "swap":
            data.draw(st.sampled_from(files)).write_bytes(bytes(content))
        elif damage == "truncate":
            file.write_bytes(bytes(content[:at]))
        elif damage == "empty":
            file.write_bytes(b"")
        elif content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(bytes(content))

    @invariant()
    def nothing_is_inconsistent(self) -> None:
        for cache in self.caches:
            check = getattr(getattr(cache, "_plane", None), "check", None)
            if check is not None:
                check()


class CacheMachineTests(CacheFactory):
    """Random histories of the cache that a subclass opens."""

    machine_examples: int = 40
    """Number of histories."""

    @level(Level.CONCURRENCY)
    def test_any_history_of_caches_serves_correct_bits_or_misses(self) -> None:
        run_machine(lambda: CacheMachine(self.open_cache), examples=self.machine_examples, steps=25)
