"""The longest hit of a chain: where each object of it lies, and why it ends where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from lmcache.index import messages
from lmcache.index.hits import Longest, fixpoint, longest, needed
from lmcache.index.pool import Entry
from lmcache.index.state import Source, State
from lmcache.plan import Chain

_NO_ENTRIES: Mapping[bytes, Entry] = MappingProxyType({})


class Found:
    """A hit of `chunks` chunks. `sources[group][position]` is set for every object in `needs[group]`."""

    __slots__ = ("chunks", "limiter", "needs", "sources")

    def __init__(
        self, chunks: int, limiter: int, needs: list[range], sources: list[list[Source] | dict[int, Source]]
    ) -> None:
        self.chunks = chunks
        self.limiter = limiter
        self.needs = needs
        self.sources = sources

    def entries(self, group: int) -> list[Entry]:
        """The needed objects of a group that are in DRAM, parents first."""
        held, need = self.sources[group], self.needs[group]
        return [source for i in need if type(source := held[i]) is Entry]

    def resident(self, group: int) -> int:
        """How many objects from the first one of the chain on are in DRAM, in a row; 0 if the first is not needed."""
        held = self.sources[group]
        return next(
            (i for i in range(self.chunks) if i not in self.needs[group] or type(held[i]) is not Entry), self.chunks
        )


def find(state: State, chain: Chain, limit: int, *, near: int | None = None) -> Found:
    """The longest hit of at most `limit` chunks that is legal for every group. Changes nothing.

    With `near`, chunks from this position on count only if they are in DRAM.
    """
    distant = limit if near is None else near
    longests: list[Longest] = []
    sources: list[list[Source] | dict[int, Source]] = []
    for group, rule in enumerate(state.rules):
        if rule.kind == "all":
            prefix = _prefix(state, chain, limit, group, distant)
            sources.append(prefix)
            longests.append(partial(min, len(prefix)))
        else:
            seen: dict[int, Source] = {}
            sources.append(seen)
            longests.append(_seeker(state, chain, group, seen, distant))
    chunks, limiter = fixpoint(longests, limit)
    needs = [needed(rule, chunks, state.chunk_tokens) for rule in state.rules]
    return Found(chunks, limiter, needs, sources)


def _prefix(state: State, chain: Chain, limit: int, group: int, distant: int) -> list[Source]:
    """Sources of the first objects of a chain, up to the first that cannot be had. One dict walk where all is in DRAM."""
    space = state.pools[group].spaces.get(chain.namespace)
    ready = space.ready if space else _NO_ENTRIES
    digests = chain.digests if limit == len(chain.digests) else chain.digests[:limit]
    found: list[Entry | None] = list(map(ready.get, digests))
    if all(found):
        return found  # type: ignore[return-value]
    first = found.index(None)
    prefix: list[Source] = found[:first]  # type: ignore[assignment]
    full = state.jobs.everyone
    tiers = [known.masks(chain.namespace, group) for known in state.known]
    for i in range(first, limit):
        source: Source | None = found[i]
        if source is None and i < distant:
            source = next((t for t, masks in enumerate(tiers) if masks.get(digests[i]) == full), None)
        if source is None:
            break
        prefix.append(source)
    return prefix


def _seeker(state: State, chain: Chain, group: int, seen: dict[int, Source], distant: int) -> Longest:
    rule = state.rules[group]

    def present(i: int) -> bool:
        if i in seen:
            return True
        source = state.source(chain.namespace, chain.digests[i], group)
        if source is None or (type(source) is int and i >= distant):
            return False
        seen[i] = source
        return True

    return lambda n: longest(rule, n, state.chunk_tokens, present)


def by_tier(state: State, found: Found) -> dict[str, int]:
    """Tokens of a hit per source. A chunk counts for the farthest place that one of its objects comes from; chunks of
    which nothing is needed (before the window of sliding layers) count for the farthest place of the whole hit.
    """
    farthest = [-2] * found.chunks
    for need, held in zip(found.needs, found.sources, strict=True):
        for i in need:
            source = held[i]
            farthest[i] = max(farthest[i], source if type(source) is int else -1)
    rest = max(farthest, default=-1)
    tokens: dict[str, int] = {}
    for place in farthest:
        t = rest if place == -2 else place
        where = "dram" if t < 0 else state.tiers[t].name
        tokens[where] = tokens.get(where, 0) + state.chunk_tokens
    return tokens


def stop_of(state: State, chain: Chain, found: Found, limit: int, max_tokens: int, late: bool) -> str:
    """Why the hit ends where it ends."""
    if found.chunks == limit:
        if limit < len(chain.digests):
            return messages.MAX_TOKENS
        return messages.END if max_tokens <= limit * state.chunk_tokens else messages.TAIL
    group = found.limiter
    if state.rules[group].kind != "all":
        return messages.GROUP + state.names[group]
    digest = chain.digests[found.chunks]
    pool = state.pools[group]
    if pool.find(chain.namespace, digest) is not None:
        return messages.WRITING
    reason = pool.gone.get(digest)
    return reason or (messages.LATE if late else messages.ABSENT)
