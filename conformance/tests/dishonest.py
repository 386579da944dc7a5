"""Fake engines: a correct one, and one for each way in which an adapter can misreport. Not a test file.

The next token is a hash of all tokens before it, so that recomputation gives the same result in every split.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence

import msgspec

from lmcache_conformance.contract import Capabilities, Request, Response, Session, SessionConfig
from lmcache_conformance.engines import EngineTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.suites.cross import CrossTests, Side

CHUNK = 16


class Hashing:
    def __init__(self, config: SessionConfig) -> None:
        self.stored: set[tuple[str, tuple[int, ...]]] = set()

    def generate(self, requests: Sequence[Request], *, reuse: bool = True) -> list[Response]:
        return [self.answer(request, reuse) for request in requests]

    def answer(self, request: Request, reuse: bool) -> Response:
        tokens, seen = list(request.tokens), []
        for _ in range(request.max_new_tokens):
            seen.append(hashlib.sha256(repr(tokens).encode()).digest())
            tokens.append(3 + int.from_bytes(seen[-1][:4], "little") % 1000)
        hit = 0
        if reuse:
            ends = range(CHUNK, len(request.tokens), CHUNK)
            hit = max((end for end in ends if (request.salt, request.tokens[:end]) in self.stored), default=0)
            self.stored |= {(request.salt, tuple(tokens[:end])) for end in range(CHUNK, len(tokens), CHUNK)}
        new = tuple(tokens[len(request.tokens) :])
        cached = {"dram": hit} if hit else {}
        return Response(tokens=new, logprobs=tuple(seen), logprob=(-1.0,) * len(new), cached=cached)

    def forget_splits(self) -> None: ...

    def drop_device_cache(self) -> None: ...

    def flush(self) -> None: ...

    def clear(self, salt: str | None = None) -> None:
        self.stored = {(s, t) for s, t in self.stored if salt is not None and s != salt}

    def stats(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None: ...


class TooFewTokens(Hashing):
    def answer(self, request: Request, reuse: bool) -> Response:
        honest = super().answer(request, reuse)
        return msgspec.structs.replace(honest, tokens=honest.tokens[:-1], logprobs=honest.logprobs[:-1])


class HitsItDoesNotHave(Hashing):
    def answer(self, request: Request, reuse: bool) -> Response:
        cached = {"dram": (len(request.tokens) - 1) // CHUNK * CHUNK}
        return msgspec.structs.replace(super().answer(request, reuse), cached=cached)


class Raises(Hashing):
    def answer(self, request: Request, reuse: bool) -> Response:
        raise KeyError("block 17")


class Hangs(Hashing):
    def answer(self, request: Request, reuse: bool) -> Response:
        time.sleep(3600)
        return super().answer(request, reuse)


class Dies(Hashing):
    def answer(self, request: Request, reuse: bool) -> Response:
        os.abort()


class NoLogprobs(Hashing):
    def answer(self, request: Request, reuse: bool) -> Response:
        return msgspec.structs.replace(super().answer(request, reuse), logprobs=())


CLAIMS = Capabilities(logprobs=True, same_split=True, salt=True, concurrent=True)


class Adapter:
    def __init__(self, session: type[Hashing], capabilities: Capabilities = CLAIMS) -> None:
        self.name = session.__name__
        self.session = session
        self.capabilities = capabilities

    def why_not(self) -> str | None:
        return None

    def open(self, config: SessionConfig) -> Session:
        return self.session(config)


honest = Adapter(Hashing)
too_few_tokens = Adapter(TooFewTokens)
hits_it_does_not_have = Adapter(HitsItDoesNotHave)
raises = Adapter(Raises)
hangs = Adapter(Hangs)
dies = Adapter(Dies)
no_logprobs = Adapter(NoLogprobs)
claims_a_restart = Adapter(Hashing, msgspec.structs.replace(CLAIMS, restart=True))


FUSED = Side("hf", {"attn_implementation": "sdpa"})
SHARES = "lmcache_hf.testing.mutants:always_shares"
EAGER = Side("hf", {"attn_implementation": "eager"})
LLAMA = Capabilities(models=("llama",), dtypes=("float32",), semantic=True, logprobs=True, restart=True)


class DishonestBound(CrossTests):
    writer, reader = FUSED, EAGER
    capabilities = LLAMA


class DishonestReader(CrossTests):
    writer, reader = FUSED, Side("lmcache_hf.testing.mutants:MutantMisreadsTheDisk.broken")


class DishonestSharing(CrossTests):
    writer, reader = Side(SHARES, FUSED.options), Side(SHARES, EAGER.options)


class DishonestBase(EngineTests):
    timeout_s = 20.0


class DishonestNot(DishonestBase):
    adapter = "dishonest:honest"


class DishonestTooFewTokens(DishonestBase):
    adapter = "dishonest:too_few_tokens"


class DishonestHitsItDoesNotHave(DishonestBase):
    adapter = "dishonest:hits_it_does_not_have"


class DishonestRaises(DishonestBase):
    adapter = "dishonest:raises"


class DishonestHangs(DishonestBase):
    adapter = "dishonest:hangs"
    timeout_s = 1.0


class DishonestDies(DishonestBase):
    adapter = "dishonest:dies"


class DishonestNoLogprobs(DishonestBase):
    adapter = "dishonest:no_logprobs"


class DishonestClaimsARestart(DishonestBase):
    adapter = "dishonest:claims_a_restart"


class DishonestWritesElsewhere(ValueTests):
    adapter = "lmcache_hf.testing.mutants:writes_elsewhere"
    timeout_s = 120.0
